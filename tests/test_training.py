"""Training: the recipe, what it keeps and chooses, resuming, errors and evaluation."""

import copy
import math
import pickle
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional

from bnn_utils import data as datasets
from bnn_utils.evaluation import evaluate, predict
from bnn_utils.layers import BinarizeLinear, binarized_weights
from bnn_utils.losses import distillation_loss, flipped_weights, margin_loss
from bnn_utils.models import build
from bnn_utils.statistics import mean_interval
from bnn_utils.training import Recipe, train

SMALL = Recipe(epochs=3, batch_size=32, lr=1e-2)
WITH_ERRORS = replace(SMALL, damage_rate=0.1, damage_below=100.0)  # from the second epoch on
ROW = ["epoch", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "sign_flips", "seconds"]


@pytest.fixture(scope="module")
def digits():
    return datasets.digits()


@pytest.fixture(scope="module")
def few(digits):
    """A few digits, with crops and mirror images, so that augmentation's randomness counts too."""
    parts = dict(train=digits.train.limit(160), validation=digits.validation.limit(80))
    return replace(digits, **parts, padding=1, flip=True)


def network(seed=0, width=0.02, name="vgg_cifar10_binary", **config):
    torch.manual_seed(seed)
    return build(name, width=width, in_channels=1, input_size=8, **config)


def small_net(seed=0):
    """Fast, and small enough for an independent computation by hand."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), BinarizeLinear(64, 16, binarize_input=False), nn.BatchNorm1d(16), BinarizeLinear(16, 10)
    )


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert list(first) == list(second)
    return all(torch.equal(first[key], second[key]) for key in first)


def without_time(history):
    return history.drop(columns="seconds")


# ---------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dict(epochs=0), "epochs"),
        (dict(batch_size=1), "batch_size"),
        (dict(lr=0.0), "lr"),
        (dict(lr=math.nan), "lr"),
        (dict(lr=math.inf), "lr"),
        (dict(weight_decay=-1e-4), "weight_decay"),
        (dict(weight_decay=math.nan), "weight_decay"),
        (dict(optimizer="adamw"), "adamw.*adam, sgd"),
        (dict(precision="float16"), "float16.*float32, bfloat16"),
        (dict(seed=-1), "seed"),
        (dict(damage_rate=1.0), r"damage_rate must lie in \[0, 1\)"),
        (dict(damage_rate=-0.1), "damage_rate"),
        (dict(damage_rate=math.nan), "damage_rate"),
        (dict(damage_spare=-0.1), "damage_spare"),
        (dict(damage_spare=math.nan), "damage_spare"),
        (dict(damage_statistics="clean"), "damage_statistics"),
        (dict(damage_below=0.0), "damage_below"),
        (dict(damage_below=math.inf), "damage_below"),
        (dict(damage_below=math.nan), "damage_below"),
        (dict(loss="hinge"), "hinge.*cross-entropy, margin"),
        (dict(margin=0.0), "margin"),
        (dict(margin=-1.0), "margin"),
        (dict(margin=math.nan), "margin"),
        (dict(margin=math.inf), "margin"),
        (dict(label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\)"),
        (dict(label_smoothing=-0.1), "label_smoothing"),
        (dict(label_smoothing=math.nan), "label_smoothing"),
        (dict(label_smoothing=0.1, loss="margin"), "label_smoothing goes with the loss cross-entropy.*margin"),
        (dict(teacher_share=1.1), r"teacher_share must lie in \[0, 1\]"),
        (dict(teacher_share=-0.1), "teacher_share"),
        (dict(teacher_share=math.nan), "teacher_share"),
        (dict(teacher_share=0.5, loss="margin"), "teacher_share goes with the loss cross-entropy.*margin"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature=math.inf), "temperature"),
    ],
)
def test_recipe_names_what_is_wrong(wrong, named):
    with pytest.raises(ValueError, match=named) as caught:
        Recipe(**wrong)
    assert str(next(iter(wrong.values()))) in str(caught.value)


def test_defaults_are_the_published_recipe():
    assert Recipe() == Recipe(epochs=100, batch_size=256, lr=5e-3, weight_decay=0.0, optimizer="adam")
    assert Recipe() == Recipe(damage_rate=0.0, loss="cross-entropy", label_smoothing=0.0, teacher_share=0.0)


def test_the_published_recipe_step_by_step(few):
    recipe, model, twin, states = replace(SMALL, epochs=2), network(), network().train(), []
    history = train(model, few, recipe, on_epoch=lambda _: states.append(pickle.dumps(model.state_dict())))
    optimizer = torch.optim.Adam(twin.parameters(), recipe.lr, fused=True)
    for epoch in range(2):
        (seed,) = np.random.SeedSequence([recipe.seed, epoch]).generate_state(1, np.uint32)
        generator = torch.Generator().manual_seed(int(seed))
        order = torch.randperm(160, generator=generator)
        losses = torch.zeros(())
        for step in range(5):
            for group in optimizer.param_groups:
                progress = (epoch + step / 5) / 2
                group["lr"] = 1e-5 + (recipe.lr - 1e-5) * (1 + math.cos(math.pi * progress)) / 2
            chosen = order[32 * step : 32 * (step + 1)]
            pixels = datasets.augment(few.train.pixels[chosen], few.padding, few.flip, generator)
            x = few.train.normalized(pixels).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(twin(x), few.train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for weight in binarized_weights(twin).values():
                weight.detach().clamp_(-1, 1)
            losses += loss.detach()
        assert history.train_loss[epoch] == losses.item() / 5
        expected = twin.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in pickle.loads(states[epoch]).items())


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("cl")), reason="no C++ compiler")
def test_compiled_training_is_the_same_training(few):
    """The compiler orders sums differently, no more: the curves of a smooth network stay together."""
    recipe = replace(SMALL, epochs=2, lr=1e-3)
    eager, compiled = (train(small_net(), few, replace(recipe, compile=c), progress=False) for c in (False, True))
    for column in ("train_loss", "validation_loss"):
        np.testing.assert_allclose(compiled[column], eager[column], rtol=1e-3)


def test_compiling_that_does_not_work_is_told(few, monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler\nin many lines")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"^torch.compile does not work here \(no C\+\+ compiler in many lines\)"):
        train(small_net(), few, replace(SMALL, compile=True), progress=False)


def test_after_step_comes_after_step_and_clamp_and_what_it_changes_stays(few):
    model, largest, first = small_net(), [], []

    def note(module, inputs):
        first.append(module[1].weight.detach().clone())

    def change(module):
        assert module is model
        largest.append(module[3].weight.abs().max().item())
        with torch.no_grad():
            module[1].weight.fill_(0.25 / len(largest))

    model.register_forward_pre_hook(note)
    train(model, few, replace(SMALL, epochs=1, lr=5.0), after_step=change)
    assert largest == [1.0] * 5
    for step in range(1, 5):
        assert torch.equal(first[step], torch.full((16, 64), 0.25 / step))


# ---------------------------------------------------------------- what a training does


def test_it_learns_digits(digits):
    model = network(width=1 / 24)
    history = train(model, digits, Recipe(epochs=5, batch_size=64, lr=1e-2))
    assert list(history) == ROW and list(history.epoch) == [1, 2, 3, 4, 5]
    assert history.train_loss.iloc[-1] < 0.75 * history.train_loss.iloc[0]
    assert history.validation_accuracy.max() > 0.5  # chance is 0.1
    assert evaluate(model, digits.test).accuracy > 0.5
    assert not model.training


def test_latent_weights_stay_within_one(few):
    model = network()
    with torch.no_grad():
        model.features[3].weight.mul_(1e3)  # so that clamping has something to do, whatever the learning rate
    train(model, few, replace(SMALL, epochs=1, lr=0.5))
    largest = {name: weight.abs().max().item() for name, weight in binarized_weights(model).items()}
    assert max(largest.values()) == 1 and largest["features.3.weight"] == 1


@pytest.mark.parametrize("lr", [1e-2, 1e-6])
def test_learning_rate_is_half_a_cosine_to_1e_5(few, lr, monkeypatch):
    used = []
    step = torch.optim.Adam.step

    def noting(self, *arguments, **named):
        used.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    history = train(small_net(), few, replace(SMALL, epochs=4, lr=lr))
    steps = 4 * (160 // 32)
    final = min(lr, 1e-5)
    expected = final + (lr - final) / 2 * (1 + np.cos(np.pi * np.arange(steps + 1) / steps))
    assert used[0] == lr and len(used) == steps
    assert used == pytest.approx(expected[:-1], rel=1e-12)
    assert history.lr.to_numpy() == pytest.approx(expected[5::5], rel=1e-12)
    assert history.lr.iloc[-1] == pytest.approx(final, rel=1e-12)


def test_last_incomplete_batch_is_left_out(few):
    batches = []
    model = small_net()
    model.register_forward_pre_hook(lambda module, inputs: batches.append((module.training, len(inputs[0]))))
    train(model, few, replace(SMALL, epochs=1, batch_size=48))
    assert [size for training, size in batches if training] == [48, 48, 48]
    batches.clear()
    train(model, few, replace(SMALL, epochs=1, batch_size=1000))  # fewer images than a batch: one batch of all
    assert [size for training, size in batches if training] == [160]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_sign_flips_against_a_count(few, optimizer):
    model = small_net()
    signs = []

    def remember(_=None):
        signs.append(np.concatenate([w.detach().numpy().ravel() >= 0 for w in binarized_weights(model).values()]))

    remember()
    history = train(model, few, replace(SMALL, optimizer=optimizer, lr=0.1), on_epoch=remember)
    counted = [np.mean(old != new) for old, new in pairwise(signs)]
    assert history.sign_flips.to_numpy() == pytest.approx(counted, abs=1e-12)
    assert 0 < max(counted) < 1 and len(signs[0]) == 64 * 16 + 16 * 10


def test_weight_decay_pulls_latent_weights_to_zero(few):
    sizes = {}
    for decay in (0.0, 5.0):
        model = small_net()
        train(model, few, replace(SMALL, optimizer="sgd", weight_decay=decay))
        sizes[decay] = model[1].weight.abs().mean().item()
    assert sizes[5.0] < 0.5 * sizes[0.0]


def test_the_best_epoch_is_what_is_left(few):
    model, kept, best = network(), [], []
    history = train(
        model,
        few,
        replace(SMALL, epochs=5, lr=5e-2),
        on_epoch=lambda row: kept.append({key: value.clone() for key, value in model.state_dict().items()}),
        on_best=lambda _, row: best.append(row["epoch"]),
    )
    ranked = history.sort_values(["validation_accuracy", "validation_loss"], ascending=[False, True], kind="stable")
    chosen = ranked.epoch.iloc[0]
    assert all(torch.equal(kept[chosen - 1][key], value) for key, value in model.state_dict().items())
    assert best[-1] == chosen and best[0] == 1 and best == sorted(best)
    row = history.loc[chosen - 1]
    assert evaluate(model, few.validation) == pytest.approx((row.validation_loss, row.validation_accuracy))


def test_test_images_choose_nothing(few):
    other = replace(few, test=replace(few.test, pixels=255 - few.test.pixels, labels=few.test.labels.flip(0)))
    first, second = network(), network()
    histories = [train(first, few, SMALL), train(second, other, SMALL)]
    pd.testing.assert_frame_equal(*map(without_time, histories))
    assert same_state(first, second)


def test_a_seed_gives_one_result(few):
    models = [network() for _ in range(3)]
    histories = [without_time(train(model, few, replace(SMALL, seed=s))) for model, s in zip(models, (4, 4, 5))]
    pd.testing.assert_frame_equal(histories[0], histories[1], check_exact=True)
    assert same_state(models[0], models[1])
    assert not same_state(models[0], models[2])


def test_bfloat16_trains_float32_weights(few):
    exact, model = network(), network()
    history = train(model, few, replace(SMALL, precision="bfloat16"))
    train(exact, few, SMALL)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert np.isfinite(history.train_loss).all()
    assert not same_state(exact, model)  # else nothing was computed in bfloat16


# ---------------------------------------------------------------- resuming


class Stopped(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_resume_equals_no_interruption(few, tmp_path, optimizer, error):
    recipe = replace(SMALL, epochs=5, lr=5e-2, optimizer=optimizer, weight_decay=1e-4, seed=3)
    whole = network()
    expected = train(whole, few, recipe, folder=tmp_path / "whole")

    def stop(row):
        if row["epoch"] in (1, 3):
            raise error

    folder = tmp_path / "parts"
    with pytest.raises(error):
        train(network(), few, recipe, folder=folder, on_epoch=stop)
    with pytest.raises(error):
        train(network(seed=8), few, recipe, folder=folder, resume=True, on_epoch=stop)
    model = network(seed=9)  # whatever it holds, the run's state replaces it
    history = train(model, few, recipe, folder=folder, resume=True)
    pd.testing.assert_frame_equal(without_time(history), without_time(expected), check_exact=True)
    assert same_state(model, whole)
    written = [without_time(pd.read_csv(path / "history.csv")) for path in (folder, tmp_path / "whole")]
    pd.testing.assert_frame_equal(*written, check_exact=True)


def test_at_most_the_epoch_under_way_is_lost(few, tmp_path):
    class Interrupted(nn.Flatten):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            if self.calls == 13:  # five steps an epoch: in the third
                raise KeyboardInterrupt
            return super().forward(x)

    model, whole = small_net(), small_net()
    model[0] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        train(model, few, SMALL, folder=tmp_path)
    assert list(pd.read_csv(tmp_path / "history.csv").epoch) == [1, 2]
    epochs = []
    resumed = small_net(seed=5)
    train(resumed, few, SMALL, folder=tmp_path, resume=True, on_epoch=lambda row: epochs.append(row["epoch"]))
    train(whole, few, SMALL)
    assert epochs == [3] and same_state(resumed, whole)


def test_resuming_a_finished_run_gives_its_result(few, tmp_path):
    model, again = network(), network(seed=6)
    history = train(model, few, SMALL, folder=tmp_path)
    pd.testing.assert_frame_equal(train(again, few, SMALL, folder=tmp_path, resume=True), history)
    assert same_state(model, again)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(lr=2e-2), "lr 0.01 there, 0.02 here"),
        (dict(epochs=2), "epochs 3 there, 2 here"),
        (dict(optimizer="sgd"), "optimizer 'adam' there, 'sgd' here"),
        (dict(seed=1), "seed 0 there, 1 here"),
        (dict(damage_rate=0.1), "damage_rate 0.0 there, 0.1 here"),
        (dict(damage_below=1.0), "damage_below 1.75 there, 1.0 here"),
        (dict(loss="margin"), "loss 'cross-entropy' there, 'margin' here"),
        (dict(label_smoothing=0.1), "label_smoothing 0.0 there, 0.1 here"),
        (dict(temperature=2.0), "temperature 1.0 there, 2.0 here"),
    ],
)
def test_another_run_is_not_resumed(few, tmp_path, change, named):
    train(network(), few, SMALL, folder=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError) as caught:
        train(network(), few, replace(SMALL, **change), folder=tmp_path, resume=True)
    message = str(caught.value)
    assert named in message and "last.pt" in message and "\n" not in message
    assert (tmp_path / "last.pt").read_bytes() == before


def test_another_network_or_data_set_is_not_resumed(few, digits, tmp_path):
    train(network(), few, SMALL, folder=tmp_path)
    with pytest.raises(ValueError, match=r"width 0\.02 there, 0\.03 here"):
        train(network(width=0.03), few, SMALL, folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match="'vgg_cifar10_binary' there, 'resnet_binary' here"):
        train(network(name="resnet_binary"), few, SMALL, folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match="binary True there, False here"):
        train(network(binary=False), few, SMALL, folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match="train_images 160 there, 1077 here"):
        train(network(), digits, SMALL, folder=tmp_path, resume=True)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_state_file_that_is_missing_broken_or_hostile(few, tmp_path):
    state = tmp_path / "last.pt"

    def refused():
        with pytest.raises(ValueError) as caught:
            train(network(), few, SMALL, folder=tmp_path, resume=True)
        assert str(state) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file" in refused()
    train(network(), few, replace(SMALL, epochs=1), folder=tmp_path)
    state.write_bytes(state.read_bytes()[:1000])
    assert "not the state of a training run" in refused()
    state.write_bytes(b"")
    assert "not the state of a training run" in refused()
    torch.save({"model": network().state_dict()}, state)
    assert "not the state of a training run" in refused()
    ran = tmp_path / "code-ran"
    hostile = Malicious(ran)
    for write in (lambda: torch.save(hostile, state), lambda: state.write_bytes(pickle.dumps(hostile, protocol=2))):
        write()
        assert "not the state of a training run" in refused()
        assert not ran.exists()


def test_resume_needs_a_folder(few):
    with pytest.raises(ValueError, match="folder"):
        train(network(), few, SMALL, resume=True)


def test_without_a_folder_nothing_is_written(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(small_net(), few, replace(SMALL, epochs=1))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- errors


def bits(weight):
    return weight.detach().clone().view(torch.int32)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["vgg_cifar10_binary", "resnet_binary"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flipped_weights_change_their_sign_alone_and_come_back(name, probability, layout):
    model = network(name=name).to(memory_format=layout)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.5, 1e-40, -1e-40])  # 1e-40 has no more than a few bits left
    with torch.no_grad():
        for weight in binarized_weights(model).values():
            index = torch.unravel_index(torch.arange(min(7, weight.numel())), weight.shape)
            weight[index] = special[: weight.numel()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = {key: (weight.detach().clone(), weight.stride()) for key, weight in binarized_weights(model).items()}
    for error in (None, Stopped, KeyboardInterrupt):
        try:
            with flipped_weights(model, probability, np.random.default_rng(0)) as count:
                counted = 0
                for key, weight in binarized_weights(model).items():
                    old = before[key][0]
                    changed = (weight >= 0) != (old >= 0)
                    counted += int(changed.sum())
                    assert torch.equal(bits(weight[~changed]), bits(old[~changed]))
                    assert torch.equal(weight.abs() <= 1, old.abs() <= 1)
                    assert torch.equal(weight[changed & (old != 0)], -old[changed & (old != 0)])
                    assert weight[changed & (old == 0)].abs().le(1e-37).all()
                assert counted == count
                others = {key: value for key, value in model.state_dict().items() if key not in before}
                assert all(torch.equal(value, state[key]) for key, value in others.items())
                if error is not None:
                    raise error
        except (Stopped, KeyboardInterrupt):
            pass
        total = sum(weight.numel() for weight, _ in before.values())
        low, high = stats.binom.interval(1 - 1e-6, total, probability) if 0 < probability < 1 else 2 * (count,)
        assert low <= count <= high and (0 < probability < 1 or count == probability * total)
        for key, weight in binarized_weights(model).items():
            assert torch.equal(bits(weight), bits(before[key][0])) and weight.stride() == before[key][1]


@pytest.mark.parametrize("spare, flipped", [(0.0, 2), (0.13, 2), (0.14, 1), (0.87, 0), (1.0, 0)])
def test_flipped_weights_spare_small_layers(spare, flipped):
    model = small_net()  # of 64 x 16 and 16 x 10 weights: 86.5% and 13.5% of all
    before = [weight.detach().clone() for weight in binarized_weights(model).values()]
    with flipped_weights(model, 1.0, np.random.default_rng(0), spare) as count:
        now = list(binarized_weights(model).values())
        changed = [((new >= 0) != (old >= 0)).float().mean().item() for new, old in zip(now, before)]
    assert changed == [1.0] * flipped + [0.0] * (2 - flipped)
    assert count == sum(weight.numel() for weight in before[:flipped])


def test_flipped_weights_names_what_is_wrong():
    model = small_net()
    before = bits(model[1].weight)
    with (
        pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got 1.5"),
        flipped_weights(model, 1.5, np.random.default_rng(0)),
    ):
        pass
    assert torch.equal(bits(model[1].weight), before)


def test_a_weight_that_two_layers_share_comes_back():
    first, second = BinarizeLinear(16, 16), BinarizeLinear(16, 16)
    second.weight = first.weight
    before = bits(first.weight)
    with flipped_weights(nn.Sequential(first, second), 0.7, np.random.default_rng(0)):
        assert not torch.equal(bits(first.weight), before)
    assert torch.equal(bits(first.weight), before)


def recording(model):
    """Note the parameters and the input of every forward pass in training mode."""
    passes = []

    def note(module, inputs):
        if module.training:
            parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
            passes.append((parameters, inputs[0].clone()))

    model.register_forward_pre_hook(note)
    return passes


def by_definition(loss, logits, labels):
    """The recipe's loss, written out."""
    if loss == "cross-entropy":
        return (logits.exp().sum(1).log() - logits[range(len(labels)), labels]).mean()
    y = torch.full_like(logits, -1.0)
    y[range(len(labels)), labels] = 1.0
    return torch.maximum(torch.zeros(()), 1.5 - y * logits).mean()


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_a_step_averages_the_clean_and_the_damaged_gradient(few, loss, statistics):
    plain = replace(few, padding=0, flip=False)
    label_of = dict(zip((x.numpy().tobytes() for x in plain.train[:][0]), plain.train.labels.tolist()))
    model = small_net()
    passes, counts, losses = recording(model), [], []

    def differentiated(parameters, x, running=None):
        labels = torch.tensor([label_of[image.numpy().tobytes()] for image in x])
        twin = small_net().train()
        twin.load_state_dict(parameters | (running or {}), strict=False)
        twin[2].train(running is None)
        value = by_definition(loss, twin(x), labels)
        value.backward()
        return value.item(), {name: parameter.grad for name, parameter in twin.named_parameters()}

    def check(module):
        clean, x = passes[0]
        done = [differentiated(clean, x)]
        if len(passes) > 1:
            damaged, again = passes[1]
            assert torch.equal(x, again)
            by_hand = dict(clean)
            for name in ("1.weight", "3.weight"):
                changed = (damaged[name] >= 0) != (clean[name] >= 0)
                by_hand[name] = torch.where(changed, -clean[name], clean[name])
            assert all(torch.equal(by_hand[name], damaged[name]) for name in clean)
            running = dict(module.named_buffers()) if statistics == "running" else None
            done.append(differentiated(by_hand, x, running))
        for name, parameter in module.named_parameters():
            expected = sum(gradient[name] for _, gradient in done) / len(done)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)
        counts.append(len(passes))
        losses.append(np.mean([value for value, _ in done]))
        passes.clear()

    rows = []
    recipe = replace(WITH_ERRORS, loss=loss, margin=1.5, damage_statistics=statistics)
    history = train(
        model, plain, recipe, after_step=check, on_epoch=lambda row: rows.append(evaluate(model, plain.validation))
    )
    assert counts == [1] * 5 + [2] * 10
    assert history.train_loss.to_numpy() == pytest.approx(np.mean(np.reshape(losses, (3, 5)), axis=1), rel=1e-5)
    assert history.validation_loss.tolist() == [row.loss for row in rows]


def test_errors_are_binomial_and_new_in_every_step(few):
    model = small_net()
    passes, flips = recording(model), []

    def count(_):
        if len(passes) > 1:
            (clean, _), (damaged, _) = passes
            pairs = [(clean[name] >= 0, damaged[name] >= 0) for name in ("1.weight", "3.weight")]
            flips.append(torch.cat([(old != new).flatten() for old, new in pairs]).numpy())
        passes.clear()

    train(model, few, replace(WITH_ERRORS, epochs=41), after_step=count)
    flips = np.array(flips)
    assert flips.shape == (200, 64 * 16 + 16 * 10)
    low, high = stats.binom.interval(1 - 1e-6, flips.size, 0.1)
    assert low <= flips.sum() <= high
    assert stats.chisquare(flips.sum(0)).pvalue > 1e-6  # each weight as often as any other
    assert len(np.unique(flips, axis=0)) == 200


def test_errors_start_below_the_threshold_and_stay(few):
    expected = train(small_net(), few, replace(SMALL, epochs=6)).train_loss
    assert expected[1] < expected[0]
    threshold = float(expected[1]) * (1 + 1e-9)
    model, ends, steps = small_net(), [], []
    passes = recording(model)

    def ruin(module):
        steps.append(1)
        if len(steps) > 10:
            with torch.no_grad():
                module[3].weight.fill_(1.0)
                module[3].bias.copy_(20 * torch.arange(10))

    recipe = replace(SMALL, epochs=6, damage_rate=0.1, damage_below=threshold)
    history = train(model, few, recipe, after_step=ruin, on_epoch=lambda _: ends.append(len(passes)))
    assert np.diff(ends, prepend=0).tolist() == [5, 5, 10, 10, 10, 10]
    assert history.train_loss[:2].tolist() == expected[:2].tolist()
    assert history.validation_loss[2:].min() > threshold  # the loss has gone up, the errors go on


def test_a_loss_that_stays_high_trains_without_errors(few):
    models = [network() for _ in range(2)]
    recipes = [SMALL, replace(SMALL, damage_rate=0.1, damage_below=1e-3)]
    histories = [without_time(train(model, few, recipe)) for model, recipe in zip(models, recipes)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert same_state(*models)


def test_the_threshold_is_in_nats_whatever_is_trained(few):
    model = small_net()
    passes = recording(model)
    history = train(model, few, replace(WITH_ERRORS, epochs=2, loss="margin", margin=1000.0))
    assert history.train_loss.min() > WITH_ERRORS.damage_below
    assert len(passes) == 5 + 10


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_running_statistics_are_of_the_clean_network(few, statistics):
    model, twin = small_net(), small_net().train()
    passes, steps = recording(model), []

    def check(module):
        parameters, x = passes[0]
        twin.load_state_dict(parameters, strict=False)  # its own running statistics stay
        twin(x)
        ours, theirs = dict(module.named_buffers()), dict(twin.named_buffers())
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert module[2].track_running_stats and module[2].training
        steps.append(len(passes))
        passes.clear()

    train(model, few, replace(WITH_ERRORS, damage_statistics=statistics), after_step=check)
    assert steps == [1] * 5 + [2] * 10


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_an_interrupted_step_gives_everything_back(few, statistics):
    class Interrupted(nn.BatchNorm1d):
        latent = None

        def forward(self, x):
            if not self.track_running_stats:
                raise KeyboardInterrupt
            if self.training:
                self.latent = [bits(weight) for weight in binarized_weights(model).values()]
            return super().forward(x)

    model = small_net()
    model[2] = Interrupted(16)
    with pytest.raises(KeyboardInterrupt):
        train(model, few, replace(WITH_ERRORS, damage_statistics=statistics))
    assert all(torch.equal(bits(w), old) for w, old in zip(binarized_weights(model).values(), model[2].latent))
    assert model[2].track_running_stats and model[2].training and int(model[2].num_batches_tracked) == 5 + 1


@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_resume_with_errors_equals_no_interruption(few, tmp_path, loss):
    recipe = replace(WITH_ERRORS, epochs=5, lr=5e-2, seed=3, loss=loss)
    whole, without = network(), network()
    expected = train(whole, few, recipe, folder=tmp_path / "whole")
    train(without, few, replace(recipe, damage_rate=0.0))
    assert not same_state(whole, without)

    def stop(row):
        if row["epoch"] in (1, 3):
            raise Stopped

    for resume in (False, True):
        with pytest.raises(Stopped):
            train(network(), few, recipe, folder=tmp_path / "parts", resume=resume, on_epoch=stop)
    model = network(seed=9)
    history = train(model, few, recipe, folder=tmp_path / "parts", resume=True)
    pd.testing.assert_frame_equal(without_time(history), without_time(expected), check_exact=True)
    assert history.attrs == expected.attrs
    assert same_state(model, whole)


def test_an_epoch_with_errors_is_better_than_any_without(few):
    steps = []

    def ruin(module):
        steps.append(1)
        if len(steps) > 5:
            with torch.no_grad():
                module[3].weight.fill_(1.0)

    for rate, best in ((0.1, 2), (0.0, 1)):
        steps.clear()
        model, kept = small_net(), []
        history = train(
            model,
            few,
            replace(WITH_ERRORS, epochs=2, damage_rate=rate),
            after_step=ruin,
            on_best=lambda _, row, kept=kept: kept.append(row["epoch"]),
        )
        assert history.validation_accuracy[1] < history.validation_accuracy[0]
        assert history.attrs["best_epoch"] == kept[-1] == best
        assert evaluate(model, few.validation).accuracy == history.validation_accuracy[best - 1]


def test_errors_in_bfloat16(few):
    model = network()
    history = train(model, few, replace(WITH_ERRORS, precision="bfloat16"))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert np.isfinite(history.train_loss).all()


def damaged_accuracy(model, images, probability, trials):
    """The mean over trials, with the errors drawn by torch and the weights replaced: another way than the library's."""
    generator, accuracies = torch.Generator().manual_seed(0), []
    for _ in range(trials):
        damaged = copy.deepcopy(model)
        with torch.no_grad():
            for weight in binarized_weights(damaged).values():
                stored = torch.where(weight >= 0, 1.0, -1.0)
                weight.copy_(torch.where(torch.rand(weight.shape, generator=generator) < probability, -stored, stored))
        accuracies.append(evaluate(damaged, images).accuracy)
    return np.mean(accuracies)


def test_training_with_errors_survives_errors(digits):
    gains = []
    for seed in range(3):
        accuracy = {}
        for rate in (0.0, 0.04):
            model = network(seed, width=1 / 24)
            train(model, digits, Recipe(epochs=8, batch_size=64, lr=1e-2, seed=seed, damage_rate=rate), progress=False)
            accuracy[rate] = damaged_accuracy(model, digits.test, 0.04, trials=10)
        gains.append(accuracy[0.04] - accuracy[0.0])
    gain, half = mean_interval(gains)
    assert gain - half > 0, (gain, half)


# ---------------------------------------------------------------- the margin loss


def slopes(function, at, step):
    """The slope of a function of an array along each of its numbers, by central differences."""
    found = np.empty_like(at)
    for index in np.ndindex(at.shape):
        away = np.zeros_like(at)
        away[index] = step
        found[index] = (function(at + away) - function(at - away)) / (2 * step)
    return found


@given(st.integers(1, 5), st.integers(2, 6), st.floats(0.1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_margin_loss_and_its_gradient(images, classes, margin, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 2, (images, classes)), rng.integers(0, classes, images)

    def by_hand(f):
        terms = [
            max(0.0, margin - (f[i, c] if c == labels[i] else -f[i, c])) for i in range(images) for c in range(classes)
        ]
        return sum(terms) / len(terms)

    x = torch.tensor(logits, requires_grad=True)
    loss = margin_loss(x, torch.tensor(labels), margin)
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(logits), abs=1e-12)
    smooth = abs(abs(logits) - margin) > 2e-6  # no slope at the kink
    assert x.grad.numpy()[smooth] == pytest.approx(slopes(by_hand, logits, 1e-6)[smooth], abs=1e-6)


def test_training_for_margins_learns_and_widens_them(digits):
    reached = {}
    for loss in ("cross-entropy", "margin"):
        model = network(width=1 / 24)
        history = train(model, digits, Recipe(epochs=8, batch_size=64, lr=1e-2, loss=loss))
        assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
        assert history.validation_accuracy.max() > 0.5
        reached[loss] = margin_loss(predict(model, digits.validation), digits.validation.labels, Recipe().margin)
    assert reached["margin"] < reached["cross-entropy"]


# ---------------------------------------------------------------- label smoothing and distillation

TAUGHT = replace(SMALL, label_smoothing=0.2, teacher_share=0.4, temperature=2.5)


def shares_of(logits):
    """The softmax, in numpy."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def taught_by_definition(logits, labels, teacher, recipe):
    """The recipe's loss and its slope along each logit, in numpy."""
    n, classes = logits.shape
    smoothing, share, temperature = recipe.label_smoothing, recipe.teacher_share, recipe.temperature
    target = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    p, q = shares_of(teacher / temperature), shares_of(logits / temperature)
    loss = (1 - share) * -np.sum(target * np.log(shares_of(logits)))
    loss += share * temperature**2 * np.sum(p * (np.log(p) - np.log(q)))
    slope = (1 - share) * (shares_of(logits) - target) + share * temperature * (q - p)
    return loss / n, slope / n


@given(st.integers(1, 5), st.integers(2, 6), st.floats(0.5, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_distillation_loss_and_its_gradient(images, classes, temperature, seed):
    rng = np.random.default_rng(seed)
    logits, teacher = rng.normal(0, 2, (2, images, classes))

    def by_hand(z):
        total = 0.0
        for image in range(images):
            p, q = (
                np.exp(each / temperature) / np.sum(np.exp(each / temperature)) for each in (teacher[image], z[image])
            )
            total += sum(p[c] * math.log(p[c] / q[c]) for c in range(classes))
        return temperature**2 * total / images

    x = torch.tensor(logits, requires_grad=True)
    loss = distillation_loss(x, torch.tensor(teacher), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(logits), abs=1e-12)
    assert x.grad.numpy() == pytest.approx(slopes(by_hand, logits, 1e-5), abs=1e-6)
    assert distillation_loss(x, x, temperature).item() == pytest.approx(0, abs=1e-12)


def float_teacher(seed=0):
    """A teacher that puts out something else in training mode; its layers are simple enough for numpy."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10, affine=False), nn.Dropout(0.5))
    teacher[2].running_var.fill_(0.05)
    return teacher.train()


def taught_by(teacher, x):
    value = {key: tensor.double().numpy() for key, tensor in teacher.state_dict().items()}
    logits = x.flatten(1).double().numpy() @ value["1.weight"].T + value["1.bias"]
    return (logits - value["2.running_mean"]) / np.sqrt(value["2.running_var"] + 1e-5)


@pytest.mark.parametrize(
    "recipe", [replace(SMALL, label_smoothing=0.2), TAUGHT, replace(TAUGHT, damage_rate=0.1, damage_below=100.0)]
)
def test_every_pass_follows_labels_and_teacher(few, recipe):
    plain = replace(few, padding=0, flip=False)
    label_of = dict(zip((x.numpy().tobytes() for x in plain.train[:][0]), plain.train.labels.tolist()))
    model, teacher = small_net(), float_teacher() if recipe.teacher_share else None
    state = copy.deepcopy((teacher or model).state_dict())
    passes, losses, seen = [], [], []

    def note(module, inputs, logits):
        if module.training:
            x = inputs[0]
            passes.append(len(x))
            labels = [label_of[image.numpy().tobytes()] for image in x]
            teaching = np.zeros((len(x), 10)) if teacher is None else taught_by(teacher, x)
            loss, slope = taught_by_definition(logits.detach().double().numpy(), labels, teaching, recipe)
            losses.append(loss)
            expected = torch.tensor(slope / counts[len(passes) - 1])  # the average of the clean and the damaged

            def check(gradient):
                torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)
                seen.append(len(gradient))

            logits.register_hook(check)

    counts = [1] * 5 + [1 + (recipe.damage_rate > 0)] * (10 * (1 + (recipe.damage_rate > 0)))
    model.register_forward_hook(note)
    history = train(model, plain, recipe, teacher=teacher)
    assert passes == seen == [32] * len(counts)
    per_epoch = np.split(np.array(losses), [5, 5 + (len(counts) - 5) // 2])
    assert history.train_loss.to_numpy() == pytest.approx([epoch.mean() for epoch in per_epoch], rel=1e-4)
    if teacher is not None:
        assert not teacher.training and all(
            torch.equal(value, state[key]) for key, value in teacher.state_dict().items()
        )
        assert [parameter.grad for parameter in teacher.parameters()] == [None, None]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_sees_the_images_of_the_model_once_a_step_in_the_recipes_precision(few, precision):
    model, teacher, pairs, kinds = small_net(), float_teacher(), [], []
    inputs = recording(model)
    teacher.register_forward_pre_hook(lambda module, arguments: pairs.append(arguments[0].clone()))
    teacher[1].register_forward_hook(lambda module, arguments, output: kinds.append(output.dtype))
    train(model, few, replace(TAUGHT, precision=precision, damage_rate=0.1, damage_below=100.0), teacher=teacher)
    clean = [x for _, x in inputs[:5] + inputs[5::2]]
    assert len(pairs) == len(clean) == 15 and all(map(torch.equal, pairs, clean))
    assert set(kinds) == {getattr(torch, precision)}


def test_smoothing_makes_a_network_less_sure(digits):
    sure = {}
    for smoothing in (0.0, 0.3):
        model = network(width=1 / 24)
        model.classifier[-1] = nn.BatchNorm1d(10)  # with a scale: without one, logits are too small to be sure
        history = train(model, digits, Recipe(epochs=5, batch_size=64, lr=1e-2, label_smoothing=smoothing))
        assert history.validation_accuracy.max() > 0.5
        sure[smoothing] = shares_of(predict(model, digits.validation).double().numpy()).max(1).mean()
    assert sure[0.3] < sure[0.0] - 0.05


class Shifted(nn.Module):
    """Says of each image the class after the one that `network` says."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).roll(1, dims=1)


def test_a_network_learns_what_its_teacher_says_not_what_the_labels_say(digits):
    recipe = Recipe(epochs=5, batch_size=64, lr=1e-2)
    teacher = network(width=1 / 24, binary=False)
    assert train(teacher, digits, recipe).validation_accuracy.max() > 0.8
    shifted = replace(digits.validation, labels=(digits.validation.labels + 1) % 10)  # by which the epoch is chosen
    model = network(seed=1, width=1 / 24)
    train(model, replace(digits, validation=shifted), replace(recipe, teacher_share=1.0), teacher=Shifted(teacher))
    assert evaluate(model, digits.validation).accuracy < 0.2
    assert evaluate(model, shifted).accuracy > 0.5


def test_a_float_network_is_trained_without_signs_or_clamps(few):
    model = network(binary=False)
    with torch.no_grad():
        model.features[3].weight[0, 0] = 3.0
    history = train(model, few, replace(SMALL, lr=1e-4))
    assert list(history.sign_flips) == [0.0] * 3
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    assert (model.features[3].weight[0, 0] > 2.9).all()


def test_teachers_and_shares_go_together(few):
    with pytest.raises(ValueError, match=r"teacher_share 0\.4 needs a teacher, got none"):
        train(small_net(), few, TAUGHT)
    with pytest.raises(ValueError, match=r"a teacher needs a teacher_share above 0, got 0\.0"):
        train(small_net(), few, SMALL, teacher=float_teacher())


def test_errors_need_binarized_weights(few, tmp_path):
    with pytest.raises(ValueError, match=r"damage_rate 0\.1 flips binarized weights, and this network has none"):
        train(network(binary=False), few, WITH_ERRORS, folder=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_resume_with_a_teacher_equals_no_interruption(few, tmp_path):
    whole = network()
    expected = train(whole, few, TAUGHT, folder=tmp_path / "whole", teacher=float_teacher())

    def stop(row):
        if row["epoch"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train(network(), few, TAUGHT, folder=tmp_path / "parts", on_epoch=stop, teacher=float_teacher())
    model = network(seed=9)
    with pytest.raises(ValueError, match=r"last\.pt: is of another run: teacher '\w+' there, '\w+' here$"):
        train(model, few, TAUGHT, folder=tmp_path / "parts", resume=True, teacher=float_teacher(seed=1))
    history = train(model, few, TAUGHT, folder=tmp_path / "parts", resume=True, teacher=float_teacher())
    pd.testing.assert_frame_equal(without_time(history), without_time(expected), check_exact=True)
    assert same_state(model, whole)


# ---------------------------------------------------------------- evaluation


def by_hand(model, images):
    """The logits of `small_net`, computed with numpy alone."""
    mean, std = np.array(images.mean), np.array(images.std)
    x = ((images.pixels.numpy() / 255 - mean[:, None, None]) / std[:, None, None]).reshape(len(images), -1)
    value = {key: tensor.double().numpy() for key, tensor in model.state_dict().items()}

    def sign(array):
        return np.where(array >= 0, 1.0, -1.0)

    hidden = x @ sign(value["1.weight"]).T + value["1.bias"]
    hidden = (hidden - value["2.running_mean"]) / np.sqrt(value["2.running_var"] + 1e-5)
    hidden = hidden * value["2.weight"] + value["2.bias"]
    return sign(hidden) @ sign(value["3.weight"]).T + value["3.bias"]


def test_evaluate_against_numpy(few):
    model = small_net()
    train(model, few, SMALL)
    logits = by_hand(model, few.validation)
    labels = few.validation.labels.numpy()
    assert predict(model, few.validation, batch_size=33).numpy() == pytest.approx(logits, abs=1e-3)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    loss, accuracy = evaluate(model, few.validation, batch_size=33)
    assert loss == pytest.approx(-np.log(shares[np.arange(len(labels)), labels]).mean(), abs=1e-3)
    assert accuracy == np.mean(logits.argmax(1) == labels)


class Fixed(nn.Module):
    """Puts out the same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize(
    ("logits", "predicted", "finite"),
    [
        ([0.0, 1.0, 9.0, *[0.0] * 7], 2, True),
        ([0.0, 1.0, 9.0, 0.0, math.nan, *[0.0] * 5], 4, False),
        ([0.0, math.nan, math.inf, *[0.0] * 7], 1, False),
        ([-math.inf] * 9 + [0.0], 9, False),
    ],
)
def test_nan_is_the_highest_logit(few, logits, predicted, finite):
    result = evaluate(Fixed(logits), few.validation)
    assert result.accuracy == np.mean(few.validation.labels.numpy() == predicted)
    assert math.isfinite(result.loss) == finite


@pytest.mark.parametrize("training", [True, False])
def test_predict_leaves_the_mode_and_statistics_alone(few, training):
    model = network().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = predict(model, few.validation)
    assert model.training is training and not logits.requires_grad
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.allclose(logits, predict(model, few.validation, batch_size=7), atol=1e-5)

    def broken(*_):
        raise Stopped

    model.register_forward_pre_hook(broken)
    with pytest.raises(Stopped):
        predict(model, few.validation)
    assert model.training is training
