"""benchmarks/large_batch.py and evidence.py: the rules, the plan, the tables."""

import json
import sys
import pytest
import torch
from test_train_net import ROOT

from agvm_d2.moments import Moments

sys.path.insert(0, ROOT)
from benchmarks import evidence, large_batch
from benchmarks.large_batch import Averaged, Cell, Gain, Run, learning_rates


def moments(unit_sq, mean_sq, num_units=4):
    as_tensor = [torch.tensor(x, dtype=torch.float64) for x in (unit_sq, mean_sq)]
    return Moments(*as_tensor, num_units, None, 0.5)


def test_gain_is_one_for_signal_and_k_for_noise():
    rule = Gain(["backbone", "fpn", "rpn"], momentum=0.5)
    rule.update(moments([1.0, 4.0, 3.0], [1.0, 1.0, 2.0]))
    assert rule.factors.tolist() == [1, 4, 1.5]
    rule.update(moments([1.0, 9.0, 0.0], [1.0, 1.0, 1.0]))
    # Averages, fpn: 0.25 * 4 + 0.5 * 9 = 5.5 to 0.75, bounded by K; rpn: 0.75 to 1, bounded by 1.
    assert rule.factors.tolist() == [1, 4, 1]


def test_averaged_takes_the_ratio_of_averaged_moments():
    rule = Averaged(["backbone", "fpn"], momentum=0.5, ratio_range=(0.5, 10))
    rule.update(moments([2.0, 1.0], [1.0, 0.5], 2))
    rule.update(moments([2.0, 1.0], [1.0, 1.0], 2))
    # phi = 2 (S1 - S2)/S1 at K = 2: backbone 1; fpn, averages 0.75 and 0.625, 2 (0.125)/0.75 = 1/3.
    assert rule.factors[1].item() == pytest.approx(3**0.5, rel=1e-5)


def test_learning_rates_follow_the_rules():
    # sqrt(8) = 2.83 and 8 times 0.08, which is linear and the paper's at batch 128.
    assert learning_rates("sgd", 128) == [0.1131, 0.2263, 0.3805, 0.64]
    assert learning_rates("agvm", 128) == learning_rates("sgd", 128)
    assert learning_rates("gain", 128) == [0.04, 0.08, 0.16]
    assert len(learning_rates("adamw", 128)) == 4


def row(run: Run, accuracy: float) -> dict:
    return {
        **run._asdict(),
        "metric": "bbox AP",
        "accuracy": accuracy,
        "diverged_at": None,
        "iterations": 250,
        "seconds": 60,
        "variance": {"backbone": {"before_drop": 0.5, "after_drop": 1.0}},
        "lr_scale": {"iteration": [1], "backbone": [1.0]},
        "torch": "2",
        "machine": "m",
    }


def test_the_best_learning_rate_gets_the_other_seeds(tmp_path):
    cell = Cell("faster_rcnn", "sgd", 16, 4)
    path = tmp_path / "rows.jsonl"
    todo = large_batch.pending([cell], str(path), set(), (1, 2, 3))
    assert [run.lr for run in todo] == [0.04, 0.08, 0.16] and {run.seed for run in todo} == {1}
    assert large_batch.pending([cell], str(path), {todo[0]}, (1, 2, 3)) == todo[1:]
    path.write_text("".join(json.dumps(row(run, run.lr)) + "\n" for run in todo))
    rest = large_batch.pending([cell], str(path), set(), (1, 2, 3))
    assert [(run.lr, run.seed) for run in rest] == [(0.16, 2), (0.16, 3)]


def test_tables(tmp_path):
    path = tmp_path / "rows.jsonl"
    base = Run("faster_rcnn", "sgd", 16, 0.04, 1, 4)
    large = base._replace(batch=128)
    rows = [
        row(base, 20.0),
        row(base._replace(seed=2), 22.0),
        row(base._replace(lr=0.08), 30.0),  # one seed: does not count against two
        row(large, 20.6),
        row(large._replace(lr=0.02), 19.0),
        row(large._replace(lr=0.08), 5.0),
        row(large._replace(lr=0.04), 20.7),  # again: the last holds
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    cells = evidence.read(str(path))
    text = evidence.report(cells)
    assert text.startswith("6 runs, 0.1 hours of one core")
    assert "| faster_rcnn | 16 | SGD | 21.0 ± 1.4 (2) | 0.04 |" in text
    assert "| faster_rcnn | 128 | SGD | 20.7 | 0.04 | 0.02 to 0.04 (×2.0) |" in text
    # 20.7 is 98.6 % of 21.0.
    assert "| faster_rcnn | SGD | 128 | 16: 100 %, 128: 99 % |" in text
    evidence.draw(cells, str(tmp_path))
    assert (tmp_path / "evidence.png").stat().st_size > 10000


def test_the_page_holds_what_the_runs_say():
    with open(evidence.DOCUMENT) as f:
        page = f.read().split(evidence.BEGIN)[1].split(evidence.END)[0]
    assert page.strip() == evidence.report(evidence.read()).strip()


def test_a_run(digits, tmp_path, monkeypatch):
    from benchmarks import pretrain

    weights = str(tmp_path / "weights.pth")
    assert 0 <= pretrain.pretrain(weights, epochs=1, batch=16)["accuracy"] <= 1
    monkeypatch.setattr(large_batch, "WEIGHTS", weights)
    monkeypatch.setattr(large_batch, "IMAGES", 24)  # of the tests' dataset
    run = Run("faster_rcnn", "gain", 32, 0.01, 1, 16, "AGVM.INTERVAL 1")
    path = tmp_path / "rows.jsonl"
    large_batch.do_run(run, str(path))
    found = large_batch.read(str(path))[run]
    assert found["iterations"] == 12 and found["diverged_at"] is None
    assert set(found["variance"]) == {"backbone", "fpn", "rpn", "box_head"}
    assert min(found["lr_scale"]["backbone"]) >= 1 and max(found["lr_scale"]["backbone"]) <= 2
