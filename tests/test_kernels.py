"""Every tile counts the same bits, on any machine that can run it, whatever the machine's own choice is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config, njit
from torch.nn import functional

from bnn_utils import kernels, loops
from bnn_utils.bits import pack_signs
from bnn_utils.layers import BinarizeConv2d, binarize
from bnn_utils.packed import PackedLayer

ROOT = Path(__file__).resolve().parents[1]
TILES = {"popcount": loops.POPCOUNT, "two-input": loops.TWO_INPUT}
if loops.target_has("avx512f"):
    TILES["three-input"] = loops.THREE_INPUT
COUNTED = {}  # the compiled loops, by tile


def counted(name):
    """Return a tile as a function of starts, offsets, filters and counts, compiled once."""
    if name not in COUNTED:
        count = loops.counter(TILES[name])

        @njit
        def call(starts, offsets, filters, counts):
            rows, stride = filters.shape[0], counts.shape[1]
            count(starts.ctypes.data, offsets.ctypes.data, rows, filters.ctypes.data, counts.ctypes.data, stride)

        COUNTED[name] = call
    return COUNTED[name]


def random_words(generator, density, *shape):
    """Draw words of which about `density` of the bits are 1."""
    bits = generator.random((*shape, 64)) < density
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint64)[..., 0]


@pytest.mark.parametrize("name", TILES)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1 << 32),
)
def test_a_tile_counts_differing_bits(name, rows, density, seed):
    tile, generator = TILES[name], np.random.default_rng(seed)
    x = random_words(generator, 0.5, 200)
    x[generator.random(200) < 0.2] = 0
    at = generator.integers(0, 100, tile.positions)
    offsets = generator.integers(0, 100, rows)
    filters = random_words(generator, density, rows, loops.PANEL)
    counts = np.full((tile.positions, loops.PANEL + 3), -1, np.int32)
    counted(name)(x.ctypes.data + 8 * at, 8 * offsets, filters, counts)
    patches = x[at[:, None] + offsets]
    expected = np.bitwise_count(patches[:, :, None] ^ filters[:, : tile.filters]).sum(1)
    assert np.array_equal(counts[:, : tile.filters], expected)
    assert (counts[:, tile.filters :] == -1).all()


@pytest.mark.parametrize("tile", ["POPCOUNT", "CARRY_SAVE"])
@settings(deadline=None, max_examples=60)
@given(
    images=st.integers(1, 3),
    inputs=st.integers(1, 200),
    channels=st.integers(1, 70),
    side=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    seed=st.integers(0, 1 << 32),
)
def test_a_convolution_of_any_shape_is_torchs(tile, images, inputs, channels, side, kernel, stride, padding, seed):
    kernel = min(kernel, *(size + 2 * padding for size in side))
    convolution = BinarizeConv2d(inputs, channels, kernel, stride, padding)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        convolution.weight.normal_(generator=generator)
    x = binarize(torch.randn(images, inputs, *side, generator=generator))
    expected = functional.conv2d(x.double(), binarize(convolution.weight.detach()).double(), None, stride, padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "TILE", getattr(loops, tile))
        words = torch.from_numpy(pack_signs(x.permute(0, 2, 3, 1)).view(np.int64))
        assert torch.equal(PackedLayer(convolution)(words).double(), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("triple", "features", "tile"),
    [
        ("x86_64-unknown-linux-gnu", "+avx2,+avx512f,+avx512vpopcntdq", loops.POPCOUNT),
        ("x86_64-unknown-linux-gnu", "+avx2,+avx512f,-avx512vpopcntdq", loops.CARRY_SAVE),
        ("x86_64-pc-windows-msvc", "+avx2", loops.CARRY_SAVE),
        ("x86_64-apple-darwin", "", loops.CARRY_SAVE),
        ("aarch64-unknown-linux-gnu", "+neon", loops.POPCOUNT),
        ("arm64-apple-darwin", "", loops.POPCOUNT),
    ],
)
def test_the_tile_is_chosen_by_the_processor_that_numba_compiles_for(triple, features, tile, monkeypatch):
    monkeypatch.setattr(config, "CPU_FEATURES", features)
    monkeypatch.setattr(loops, "get_process_triple", lambda: triple)
    assert loops.best_tile() is tile


RESTRICTED = """
import numpy as np
import torch
from bnn_utils import kernels, loops
from bnn_utils.bits import pack_signs
from bnn_utils.layers import BinarizeConv2d, binarize
from bnn_utils.packed import PackedLayer
print(kernels.TILE is loops.best_tile(), loops.CARRY_SAVE is loops.TWO_INPUT)
convolution, x = BinarizeConv2d(192, 64, 3, bias=False), binarize(torch.randn(2, 192, 5, 5))
expected = torch.nn.functional.conv2d(x, binarize(convolution.weight)).permute(0, 2, 3, 1)
words = torch.from_numpy(pack_signs(x.permute(0, 2, 3, 1)).view(np.int64))
torch.set_num_threads(1)
for kernels.TILE in (loops.POPCOUNT, loops.CARRY_SAVE):
    print(torch.equal(PackedLayer(convolution)(words).float(), expected))
"""


def test_a_processor_without_vector_extensions_counts_the_same(tmp_path):
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", RESTRICTED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 4
