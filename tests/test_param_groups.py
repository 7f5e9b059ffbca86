import copy
import pytest
import torch
from torch import nn
from toy import ToyDetector, batch, loss, parameter_names

from agvm_d2 import split_param_groups
from agvm_d2.modules import assign_modules
from agvm_d2.param_groups import fit_loaded_state, loading_as_torch, module_of_groups


def names_in(model, group):
    name = {p: n for n, p in model.named_parameters()}
    return [name[p] for p in group["params"]]


# Splitting


def test_split_gives_each_module_a_group_and_keeps_every_key():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8, weight_decay=0.01)
    optimizer.param_groups[0]["their_key"] = "kept"
    groups = optimizer.param_groups
    assert split_param_groups(optimizer, model) is optimizer
    assert optimizer.param_groups is groups  # who holds the list sees the new groups
    assert [names_in(model, g) for g in optimizer.param_groups] == list(
        parameter_names(model).values()
    )
    for group in optimizer.param_groups:
        kept = {key: group[key] for key in ("lr", "momentum", "weight_decay", "their_key")}
        assert kept == {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01, "their_key": "kept"}


def test_split_keeps_the_groups_that_were_there():
    model = ToyDetector()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": biases, "lr": 0.2}], lr=0.1)
    split_param_groups(optimizer, model)
    assert [(len(g["params"]), g["lr"]) for g in optimizer.param_groups] == [
        (2, 0.1),
        (1, 0.1),
        (1, 0.1),
        (1, 0.1),
        (2, 0.2),
        (1, 0.2),
        (1, 0.2),
        (1, 0.2),
    ]


def test_split_keeps_names_beside_their_parameters():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["param_names"] = [n for n, _ in model.named_parameters()]
    split_param_groups(optimizer, model)
    for group in optimizer.param_groups:
        assert group["param_names"] == names_in(model, group)


def test_split_changes_no_bit_of_a_step():
    a, b = ToyDetector(), ToyDetector()
    one = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
    two = split_param_groups(torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9), b)
    for model, optimizer in ((a, one), (b, two)):
        for seed in range(3):
            optimizer.zero_grad()
            loss(model, batch(4, seed=seed)).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_split_takes_frozen_parameters_along():
    model = ToyDetector()
    model.backbone.fpn_lateral2.requires_grad_(False)
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    # In a group of their own module, in case they are unfrozen.
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 2, 2, 2]
    names = [["backbone"] * 4, ["fpn"] * 2, ["rpn"] * 2, ["box_head"] * 2]
    owner = {p: m for m, ns in parameter_names(model).items() for p in map(model.get_parameter, ns)}
    assert [[owner[p] for p in g["params"]] for g in optimizer.param_groups] == names


def test_split_after_the_scheduler_is_an_error():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="Split first, then build the scheduler"):
        split_param_groups(optimizer, model)


def test_split_names_a_stranger():
    model = ToyDetector()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(3, 2))], lr=0.1)
    with pytest.raises(ValueError, match=r"group 0 .*shape \(3, 2\) that is not in the model"):
        split_param_groups(optimizer, model)


def test_split_by_given_patterns():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split_param_groups(optimizer, model, (("body", r"backbone\."), ("heads", "")))
    assert [len(g["params"]) for g in optimizer.param_groups] == [6, 4]


# The module of each group


def test_module_of_each_group():
    model = ToyDetector()
    model.backbone.fpn_lateral2.requires_grad_(False)
    modules = assign_modules(model)
    parts = [model.roi_heads, model.backbone.fpn_lateral2, model.proposal_generator]
    optimizer = torch.optim.SGD([{"params": list(part.parameters())} for part in parts], lr=0.1)
    assert list(modules) == ["backbone", "rpn", "box_head"]
    assert module_of_groups(optimizer, modules) == [2, -1, 1]


def test_a_group_of_two_modules_is_named():
    model = ToyDetector()
    groups = [{"params": list(part.parameters())} for part in (model.roi_heads, model.backbone)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match="Group 1 .*mixes the modules backbone, fpn, .*Call split"):
        module_of_groups(optimizer, assign_modules(model))


# Saved states


def two_groups(model, optimizer_class=torch.optim.SGD, **options):
    """Weights and biases apart, with a learning rate each, as projects have it."""
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    return optimizer_class([{"params": others}, {"params": biases, "lr": 0.02}], lr=0.1, **options)


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss(model, batch(4, seed=seed)).backward()
        optimizer.step()


@pytest.mark.parametrize("saved_split", [False, True])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_goes_on_in_split_groups_with_the_same_bits(optimizer_class, saved_split):
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    one = ToyDetector()
    before = two_groups(one, optimizer_class, **options)
    if saved_split:
        split_param_groups(before, one)
    train(one, before, range(3))
    before.param_groups[-1]["lr"] = 0.005  # as a scheduler left it

    two = ToyDetector()
    two.load_state_dict(one.state_dict())
    after = split_param_groups(two_groups(two, optimizer_class, **options), two)
    after.load_state_dict(copy.deepcopy(before.state_dict()))  # as from a file
    train(one, before, range(3, 6))
    train(two, after, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    lrs = [0.1] * 4 + ([0.02] * 3 if saved_split else [0.005] * 3) + [0.005]
    assert [g["lr"] for g in after.param_groups] == lrs
    assert [len(g["params"]) for g in after.param_groups] == [2, 1, 1, 1, 2, 1, 1, 1]


def test_a_state_of_other_groups_is_refused():
    model = ToyDetector()
    halves = split_param_groups(two_groups(model), model, (("a", "backbone"), ("b", "")))
    message = "has 4 param groups of .3, 2, 3, 2. parameters; this one has 8.*AGVM.MODE .monitor"
    with pytest.raises(ValueError, match=message):
        split_param_groups(two_groups(model), model).load_state_dict(halves.state_dict())
    plain = two_groups(model)
    fit_loaded_state(plain)
    with pytest.raises(ValueError, match="has 4 param groups .*; this one has 2"):
        plain.load_state_dict(halves.state_dict())


def test_a_state_of_another_optimizer_is_refused():
    model = ToyDetector()
    sgd, adamw = (
        split_param_groups(two_groups(model, c), model)
        for c in (torch.optim.SGD, torch.optim.AdamW)
    )
    with pytest.raises(ValueError, match="than AdamW: it has momentum instead of betas"):
        adamw.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match="than SGD: it has betas instead of momentum"):
        sgd.load_state_dict(adamw.state_dict())


def test_pytorch_optimizers_classes_load_what_was_saved_before_the_split():
    Lamb = loading_as_torch(pytest.importorskip("pytorch_optimizer").Lamb)

    def made():
        model = ToyDetector()
        rpn, box = model.proposal_generator, model.roi_heads.box_head
        mixed = [rpn.weight, box.weight, rpn.bias, box.bias, *model.backbone.parameters()]
        return model, Lamb(mixed, lr=0.1)

    model, optimizer = made()
    fit_loaded_state(optimizer)
    model(batch(4))["loss_box"].backward()  # none in the RPN: it has no state
    optimizer.step()
    other, split = made()
    split_param_groups(split, other).load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), other.parameters()):
        saved, found = optimizer.state[p], split.state[q]
        assert saved.keys() == found.keys() and bool(saved) == (p.grad is not None)
        assert all(torch.equal(saved[key], found[key]) for key in saved)
