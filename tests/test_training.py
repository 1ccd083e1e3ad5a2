"""Training: the recipe, what it keeps and chooses, resuming, evaluation, and many trainings at once."""

import math
import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bnn_utils import data as datasets
from bnn_utils.layers import BinarizeLinear, binarized_weights
from bnn_utils.models import build
from bnn_utils.training import Job, Recipe, evaluate, predict, train, train_many

SMALL = Recipe(epochs=3, batch_size=32, lr=1e-2)
ROW = ["epoch", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "sign_flips", "seconds"]


@pytest.fixture(scope="module")
def digits():
    return datasets.digits()


@pytest.fixture(scope="module")
def few(digits):
    """A few digits, with crops and mirror images, so that augmentation's randomness counts too."""
    parts = dict(train=digits.train.limit(160), validation=digits.validation.limit(80))
    return replace(digits, **parts, padding=1, flip=True)


def network(seed=0, width=0.02, name="vgg_cifar10_binary"):
    torch.manual_seed(seed)
    return build(name, width=width, in_channels=1, input_size=8)


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
    ],
)
def test_recipe_names_what_is_wrong(wrong, named):
    with pytest.raises(ValueError, match=named) as caught:
        Recipe(**wrong)
    assert str(next(iter(wrong.values()))) in str(caught.value)


def test_defaults_are_the_published_recipe():
    assert Recipe() == Recipe(epochs=100, batch_size=256, lr=5e-3, weight_decay=0.0, optimizer="adam")


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
        (dict(epochs=7), "epochs 3 there, 7 here"),
        (dict(optimizer="sgd"), "optimizer 'adam' there, 'sgd' here"),
        (dict(seed=1), "seed 0 there, 1 here"),
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


# ---------------------------------------------------------------- many trainings


def jobs():
    return [Job(dict(kind="a", trial=seed), network(seed), replace(SMALL, epochs=2, seed=seed)) for seed in range(3)]


def test_train_many_is_the_trainings_one_by_one(few, capfd):
    threads = torch.get_num_threads()
    serial = train_many(jobs(), few, workers=1)
    assert torch.get_num_threads() == threads
    parallel = train_many(jobs(), few, workers=2)
    pd.testing.assert_frame_equal(without_time(serial), without_time(parallel), check_exact=True)
    assert list(serial) == ["kind", "trial", *ROW]
    assert list(serial.trial) == [0, 0, 1, 1, 2, 2] and list(serial.epoch) == [1, 2] * 3
    torch.set_num_threads(1)
    try:
        alone = [train(job.model, few, job.recipe) for job in jobs()]
    finally:
        torch.set_num_threads(threads)
    alone = without_time(pd.concat(alone, ignore_index=True))
    pd.testing.assert_frame_equal(without_time(serial)[list(alone)], alone, check_exact=True)
    assert capfd.readouterr().out == ""


def test_train_many_leaves_the_networks_as_they_are(few):
    job = jobs()[0]
    train_many([job], few, workers=1)
    assert same_state(job.model, network(0)) and job.model.training


def test_train_many_names_what_is_wrong(few):
    with pytest.raises(ValueError, match="jobs"):
        train_many([], few)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        train_many(jobs(), few, workers=0)
    with pytest.raises(ValueError, match=r"columns of the history itself .*: epoch, lr"):
        train_many([Job(dict(lr=1, epoch=1, kind="a"), small_net(), SMALL)], few, workers=1)
