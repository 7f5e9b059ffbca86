"""A signal ends training after an iteration, on all workers alike, with a checkpoint that goes on
bit for bit. The launchers are in tests/integration/test_preempted_runs.py."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from helpers import same
from toy import ToyTrainer, toy_config

from agvm_d2.d2 import preemption
from agvm_d2.d2.loader import ResumableLoader
from agvm_d2.d2.preemption import EXIT_CODE, SIGNALS, Preempted, PreemptionHook, SignalCatcher

NAMES = [signal.Signals(s).name for s in SIGNALS]


def send(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)


class Signalled(HookBase):
    """Sends `signum` in the step of `iteration`, on `ranks`; notes which iterations were done."""

    def __init__(self, iteration, signum, ranks=(0,)):
        self.iteration, self.signum, self.ranks = iteration, signum, ranks
        self.done = []

    def before_step(self):
        if self.trainer.iter == self.iteration and comm.get_rank() in self.ranks:
            send(self.signum)

    def after_step(self):
        self.done.append(self.trainer.iter)


class Trainer(ToyTrainer):
    """Evaluates in a function of the test's."""

    evaluate = staticmethod(dict)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return cls.evaluate()

    @classmethod
    def build_train_loader(cls, cfg):
        return ResumableLoader(
            [{"place": i} for i in range(40)],
            image,
            cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
            InOrder,
            grouping=False,
        )


class InOrder:
    def __init__(self, seed):
        pass

    def __iter__(self):
        i = comm.get_rank()
        while True:
            yield i % 40
            i += comm.get_world_size()


def image(record):
    generator = torch.Generator().manual_seed(record["place"])
    x = torch.randn(6, generator=generator) + 0.1 * torch.randn(6)
    return {"image": x, "target": x[:1]}


def train(folder, *hooks, resume=False, evaluate=dict, **options):
    """The last checkpoint, and whether the run was preempted."""
    trainer = type("Trainer", (Trainer,), {"evaluate": staticmethod(evaluate)})(
        toy_config(folder, SEED=5, **options)
    )
    trainer.register_hooks(hooks)
    trainer.resume_or_load(resume=resume)
    try:
        trainer.train()
        preempted = False
    except Preempted as error:
        assert error.code == EXIT_CODE
        preempted = True
    finally:
        for signum in SIGNALS:  # ignored in workers that are about to end
            if signal.getsignal(signum) == signal.SIG_IGN:
                signal.signal(signum, signal.SIG_DFL)
    comm.synchronize()
    return torch.load(trainer.checkpointer.get_checkpoint_file(), weights_only=True), preempted


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))[0]


@pytest.fixture(autouse=True)
def default_handlers():
    """pytest's own, as of a process that nobody has set up."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in SIGNALS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_in_an_iteration(name, whole, tmp_path, d2_log):
    signum = getattr(signal, name)
    hook = Signalled(4, signum)
    last, preempted = train(tmp_path, hook)
    assert preempted and hook.done == [0, 1, 2, 3, 4]
    assert last["iteration"] == last["trainer"]["iteration"] == 4
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    assert f"{name}: stopping after iteration 4." in d2_log.text
    assert "the same command with --resume goes on" in d2_log.text
    assert signal.getsignal(signum) == signal.SIG_DFL  # as it was
    hook = Signalled(-1, signum)
    last, preempted = train(tmp_path, hook, resume=True)
    assert not preempted and hook.done == [5, 6, 7, 8, 9]
    same(last, whole)


def test_a_hook_registered_later_has_done_its_part(tmp_path):
    """Such as an average of the weights: the checkpoint holds its state after the iteration."""

    class Later(HookBase):
        steps = 0

        def after_step(self):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

    last, _ = train(tmp_path, Signalled(4, signal.SIGTERM), Later())
    hooks = last["trainer"]["hooks"]
    assert [v for k, v in hooks.items() if k.endswith("Later")] == [{"steps": 5}]


@pytest.mark.parametrize("when", ["before", "in"])
def test_a_signal_in_an_evaluation(when, whole, tmp_path):
    calls = []

    def evaluate():
        calls.append("begun")
        if len(calls) == 1:
            send()
        calls.append("ended")
        return {}

    class Before(HookBase):
        def state_dict(self):  # the checkpoint comes before the evaluation
            if self.trainer.iter == 5 and when == "before":
                send()
            return {}

    options = {"TEST__EVAL_PERIOD": 6, "SOLVER__CHECKPOINT_PERIOD": 6}
    hook = Signalled(-1, 0)  # registered after the evaluation
    last, preempted = train(tmp_path, Before(), hook, evaluate=evaluate, **options)
    assert preempted and last["iteration"] == 5
    assert hook.done == [0, 1, 2, 3, 4, 5]
    assert calls == (["begun"] if when == "in" else [])
    calls[:] = ["earlier"]
    last, preempted = train(tmp_path, resume=True, evaluate=evaluate, **options)
    assert not preempted and calls == ["earlier", "begun", "ended"]
    same(last, whole)


def test_a_signal_in_the_last_evaluation(whole, tmp_path):
    calls = []

    def evaluate():
        calls.append("begun")
        if len(calls) == 1:
            send()
        return {}

    last, preempted = train(tmp_path, evaluate=evaluate)
    assert preempted and (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    same(last, whole)
    last, preempted = train(tmp_path, resume=True, evaluate=evaluate)
    assert not preempted and len(calls) == 2
    same(last, whole)


def test_an_evaluation_whose_loader_the_signal_has_ended(tmp_path):
    def evaluate():
        try:
            send()
        except Preempted:
            raise RuntimeError("DataLoader worker is killed by signal: Terminated.") from None

    last, preempted = train(tmp_path, evaluate=evaluate, TEST__EVAL_PERIOD=6)
    assert preempted and last["iteration"] == 5


def test_an_evaluation_that_fails_is_no_preemption(tmp_path):
    def evaluate():
        raise RuntimeError("no such category")

    with pytest.raises(RuntimeError, match="no such category"):
        train(tmp_path, evaluate=evaluate, TEST__EVAL_PERIOD=6)


def test_a_signal_before_the_first_iteration_saves_nothing(tmp_path):
    class Early(HookBase):
        def before_train(self):
            send()

    trainer = Trainer(toy_config(tmp_path))
    trainer.register_hooks([Early()])
    with pytest.raises(Preempted):
        trainer.train()
    assert not [*tmp_path.glob("*.pth")] and not (tmp_path / "last_checkpoint").exists()


def test_a_signal_while_saving(whole, tmp_path):
    class State(HookBase):
        def state_dict(self):
            if self.trainer.iter == 3:
                send()
            return {}

    options = {"SOLVER__CHECKPOINT_PERIOD": 4}
    last, preempted = train(tmp_path, State(), **options)
    assert preempted and last["iteration"] == 3
    torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    last, _ = train(tmp_path, resume=True, **options)
    same(last, whole)


def test_a_worker_that_the_signal_has_not_reached_is_not_waited_for(tmp_path, monkeypatch):
    """The others wait for a moment after the evaluation, then the main process saves and leaves."""
    waited = []

    def answer(self, *timeout):
        waited.extend(timeout)
        if timeout:
            raise RuntimeError("timed out")
        return 0

    def evaluate():
        monkeypatch.setattr(PreemptionHook, "_answer", answer)
        send()

    last, preempted = train(tmp_path, evaluate=evaluate, TEST__EVAL_PERIOD=6)
    assert preempted and last["iteration"] == 5
    assert waited == [preemption.PATIENCE]


# Two workers.


def two_workers(folder, ranks, phase, resume):
    """Iterations done, and whether the worker left."""
    hook = Signalled(4 if phase == "iteration" and not resume else -1, signal.SIGTERM, ranks)

    def evaluate():
        if phase == "evaluation" and not resume and comm.get_rank() in ranks:
            send()
            time.sleep(60)
        return {}

    last, preempted = train(folder, hook, resume=resume, evaluate=evaluate, TEST__EVAL_PERIOD=6)
    return hook.done, preempted, last


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("phase, done", [("iteration", 4), ("evaluation", 5)])
def test_workers_leave_alike(phase, done, ranks, workers, tmp_path):
    start = time.monotonic()
    found = workers(2).run(two_workers, tmp_path, ranks, phase, False)
    assert [f[:2] for f in found] == [(list(range(done + 1)), True)] * 2
    assert found[0][2]["iteration"] == done
    assert time.monotonic() - start < 45
    found = workers(2).run(two_workers, tmp_path, ranks, phase, True)
    assert [f[:2] for f in found] == [(list(range(done + 1, 10)), False)] * 2
    undisturbed = workers(2).run(two_workers, tmp_path / "whole", (), phase, False)
    same(found[0][2], undisturbed[0][2])


# Signals themselves.


def test_the_same_signal_again_ends_at_once(monkeypatch):
    ended, seen, last_words = [], [], []
    monkeypatch.setattr(preemption, "end_by", ended.append)
    catcher = SignalCatcher(seen.append, lambda: last_words.append("stop"))
    catcher.install()
    try:
        for _ in range(3):  # from a terminal, Slurm and a launcher
            send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert not ended and catcher.signum == signal.SIGTERM
        assert seen == [signal.SIGTERM] * 3 + [signal.SIGUSR1]
        catcher._first[signal.SIGTERM] -= preemption.AGAIN
        send(signal.SIGHUP)
        assert not ended
        send(signal.SIGTERM)
        assert ended == [signal.SIGTERM] and last_words == ["stop"]
        catcher.forget()  # training begins anew
        assert catcher.signum == 0
        send(signal.SIGTERM)
        assert ended == [signal.SIGTERM] and catcher.signum == signal.SIGTERM
    finally:
        catcher.restore()


DEAF = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also of the threads that come now
from agvm_d2.d2.preemption import end_by
end_by(signal.SIGTERM)
"""


def test_a_process_that_its_own_signal_does_not_end():
    """As a container's first process, on which the kernel lets no default action fall."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DEAF], check=False)
    assert done.returncode == 128 + signal.SIGTERM


def test_what_others_do_with_a_signal_stays():
    own, seen = [], []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGUSR1, lambda *_: own.append("project"))
    catcher = SignalCatcher(seen.append)
    catcher.install()
    for signum in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        send(signum)
    catcher.restore()
    assert own == ["project"] and seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def wait_for(pid, seconds=10.0):
    """Its status, once it has ended."""
    for _ in range(int(seconds / 0.01)):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the signal has not ended it")


@pytest.mark.parametrize("wait", [0.0, 0.1])
def test_a_forked_childs_sigterm_ends_it(wait):
    """As multiprocessing.Pool ends its workers, which wait for a lock; also before it has begun."""
    catcher, lock = SignalCatcher(lambda signum: None), multiprocessing.Lock()
    catcher.install()
    lock.acquire()
    try:
        for _ in range(20 if not wait else 2):
            with catcher.not_in_children():
                child = os.fork()
            if child == 0:
                try:
                    lock.acquire()
                finally:
                    os._exit(1)
            time.sleep(wait)
            os.kill(child, signal.SIGTERM)
            assert os.WTERMSIG(wait_for(child)) == signal.SIGTERM
        assert not catcher.signum
        send(signal.SIGTERM)  # here the handler stays
        assert catcher.signum == signal.SIGTERM
    finally:
        catcher.restore()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_evaluations_pool_is_ended(tmp_path):
    class Pooled(Trainer):
        @classmethod
        def test(cls, cfg, model):
            with multiprocessing.get_context("fork").Pool(1) as pool:
                found.append(pool.apply(signal.getsignal, [signal.SIGTERM]))

    found = []
    trainer = Pooled(toy_config(tmp_path, SOLVER__MAX_ITER=2, TEST__EVAL_PERIOD=1))
    trainer.train()
    assert found == [signal.SIG_DFL] * 2


def test_a_projects_loader_outlives_a_signal_to_all_processes_while_training():
    catcher = SignalCatcher(lambda signum: None)
    catcher.install()
    try:
        loader = torch.utils.data.DataLoader(range(100), num_workers=1)
        batches = iter(loader)
        next(batches)
        (child,) = batches._workers
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # SIGTERM is torch's there
            os.kill(child.pid, signum)
        assert [int(next(batches)) for _ in range(50)] == list(range(1, 51))
        assert child.is_alive()
    finally:
        catcher.restore()


def test_a_loaders_processes_leave_signals_to_the_trainer():
    others = set(multiprocessing.active_children())
    loader = ResumableLoader(
        [{"place": i} for i in range(40)], image, 4, InOrder, num_workers=2, grouping=False
    )
    batches = iter(loader)
    next(batches)
    children = [p for p in multiprocessing.active_children() if p not in others]
    assert len(children) == 2
    for signum in SIGNALS:
        for child in children:
            stranger = os.fork()  # SIGTERM of the trainer itself does end them
            if stranger == 0:
                os.kill(child.pid, signum)
                os._exit(0)
            os.waitpid(stranger, 0)
    for _ in range(10):
        assert len(next(batches)) == 4
    assert all(child.is_alive() for child in children)
    children[0].terminate()
    children[0].join(10)
    assert children[0].exitcode == 0
    del batches
    children[1].join(10)
    assert not children[1].is_alive()
