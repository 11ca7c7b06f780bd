"""What `describe` says of configurations, and FLOP counts against counting by hand."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs import minimax_text_01, scaling_study
from mmx_jax.config import ConfigError
from mmx_jax.describe import count_parameters, description, print_description, readable_bytes, readable_flops
from mmx_jax.flops import (
    causal_pairs,
    forward_flops,
    peak_flops,
    published_parameters,
    published_training_flops_per_token,
    training_flops_per_token,
)
from tests.model.common import tiny
from tools import model_table

ROOT = Path(__file__).parents[1]
RELEASED = minimax_text_01.get_config()


def test_the_command_on_the_released_model():
    """INV-01, INV-02, INV-32: the figures that it must print, as tables and as JSON."""
    command = [sys.executable, "-m", "mmx_jax.describe", "--config", "configs/minimax_text_01.py"]
    tables = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for figure in ("456,089,655,296", "48,403,306,496", "47,174,113,280", "45,944,920,064", "280 MiB", "40,960"):
        assert figure in tables
    facts = json.loads(subprocess.run([*command, "--json", "--config.model.num_experts=16", "--lengths=1000"],
                                      capture_output=True, text=True, cwd=ROOT, check=True).stdout)  # fmt: skip
    assert facts["shape"]["E"] == 16
    assert facts["parameters"]["total"] == 456_089_655_296 - 80 * 16 * (169_869_312 + 6144)
    assert list(facts["flops_per_token"]) == ["1000"]


def test_the_command_refuses_patterns_that_match_nothing():
    """Exit code 2 and one line that names the stage, the pattern and near ones, before any figure."""
    command = [sys.executable, "-m", "mmx_jax.describe", "--config", "configs/research_60m.py"]
    done = subprocess.run([*command, "--config.stages.0.trainable.0.pattern=hed"], capture_output=True, text=True,
                          cwd=ROOT, check=False)  # fmt: skip
    assert done.returncode == 2
    assert not done.stdout
    assert "stage 'pretrain': trainable: pattern 'hed' matches no parameter; near ones that do: 'head'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_figures_of_the_description():
    """Caches, training memory and active parameters of the released model."""
    facts = description(RELEASED, (1_000_000,))
    sizes = facts["bytes"]
    assert sizes["weights"]["bfloat16"] == 912_179_310_592
    assert sizes["training"]["moments"] == 2 * 4 * 456_089_655_296
    assert sizes["cache_per_sequence"]["1000000"] == 280 * 2**20 + 1_000_000 * 40_960
    assert facts["parameters"]["active_components"]["experts"] * 16 == facts["parameters"]["components"]["experts"]


def test_every_configuration_can_be_shown():
    """Tables of all configurations fit into 80 columns."""
    for _, run in model_table.runs():
        console = Console(width=80, record=True, file=io.StringIO())
        print_description(description(run), console)
        assert run.name in console.export_text()


def test_the_table_of_models_is_up_to_date():
    """docs/models.md is what the command writes."""
    assert model_table.DOCUMENT.read_text() == model_table.page(), "run `python tools/model_table.py`"


@pytest.mark.parametrize(
    ("size", "softmax", "lightning"),
    [("70m", 20.5, 21.2), ("160m", 85.0, 87.3), ("410m", 334.1, 327.7), ("1b", 906.2, 918.6), ("3b", 2775.8, 2798.4),
     ("7b", 6476.5, 6509.6)],
)  # fmt: skip
def test_the_scaling_study_has_the_published_sizes(size, softmax, lightning):
    """recipe §2.3: non-embedding parameters in millions, within 0.5%; the hybrid ends in softmax or has every 8th."""
    for kind, published in (("softmax", softmax), ("lightning", lightning)):
        counts = count_parameters(scaling_study.get_config(f"{size},{kind}").model)
        assert counts.active_without_both / 1e6 == pytest.approx(published, rel=5e-3)
    layers = scaling_study.get_config(f"{size},hybrid").model.layers
    softmax_layers = [i for i, layer in enumerate(layers) if layer == "softmax"]
    assert softmax_layers == (list(range(7, len(layers), 8)) or [len(layers) - 1])


def test_an_unknown_variant_is_refused():
    """The message lists sizes and kinds."""
    with pytest.raises(ConfigError, match="70m, 160m"):
        scaling_study.get_config("13b,hybrid")


def test_schedule_and_batch_of_the_released_model():
    """recipe §4.5: 7.2T, 10.4T and 11.4T tokens; 16M, 32M, 64M and 128M tokens a step as sequences of 8,192."""
    stage = RELEASED.stages[0]
    assert [(p.until_tokens, p.learning_rate, p.shape) for p in stage.schedule.phases] == [
        (7_200_000_000_000, 2e-4, "constant"),
        (10_400_000_000_000, 1.3e-4, "constant"),
        (11_400_000_000_000, 3e-5, "exponential"),
    ]
    assert stage.schedule.warmup_steps == 500
    assert [(start, rows * 8192 / 2**20) for start, rows in stage.batch.ramp] == [
        (0, 16), (69 * 10**9, 32), (790 * 10**9, 64), (4700 * 10**9, 128),
    ]  # fmt: skip


# FLOPs


def matmul_flops(config, length, chunk):
    """Counts every product of a forward pass over one sequence by listing its operands."""
    D, N, K, H, F = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_hidden_size
    total = 0.0

    def product(m, k, n):
        nonlocal total
        total += 2 * m * k * n

    for kind in config.layers:
        if kind == "lightning":
            product(length, D, 3 * N * H)
            if config.gate_rank:
                product(length, D, config.gate_rank)
                product(length, config.gate_rank, N * H)
            else:
                product(length, D, N * H)
            for start in range(0, length, chunk):
                for row in range(min(chunk, length - start)):
                    product(N, H, row + 1)  # scores with the chunk's keys so far
                    product(N, row + 1, H)  # their values
                    product(N, H, H)  # read the state
                    product(N, H, H)  # write to it
        else:
            product(length, D, (N + 2 * K) * H)
            for row in range(length):
                product(N, H, row + 1)
                product(N, row + 1, H)
        product(length, N * H, D)
        experts = config.experts_per_token if config.num_experts else 1
        product(length, D, config.num_experts)
        for _ in range(experts):
            product(length, D, 2 * F)
            product(length, F, D)
    product(length, D, config.vocab_size)
    return total


@pytest.mark.parametrize("length", [1, 7, 64, 100])
@pytest.mark.parametrize("changes", [{}, {"gate_rank": 3, "num_experts": 0}, {"experts_per_token": 1}])
def test_exact_count_equals_counting_every_product(length, changes):
    """Forward FLOPs per token of the model as built, ragged chunks included; training is three times that."""
    config = tiny(**changes)
    expected = matmul_flops(config, length, 16) / length
    assert forward_flops(config, length, chunk=16).total == pytest.approx(expected, rel=1e-12)
    assert training_flops_per_token(config, length, chunk=16) == pytest.approx(3 * expected, rel=1e-12)


def test_decoding_a_token_costs_its_share():
    """The last token's products: all earlier keys, no chunk; lightning's share knows no length."""
    config = tiny()
    near, far = (forward_flops(config, n, decode=True) for n in (10, 1000))
    assert far.lightning_mixing == near.lightning_mixing == 7 * 4 * 4 * 8 * 8
    assert far.softmax_mixing == 4 * 4 * 8 * 1000


def test_the_count_is_what_the_compiler_counts():
    """XLA's own count of a dense lightning model's matmuls at one token agrees, norms and activations aside."""
    import jax
    import jax.numpy as jnp

    from mmx_jax.model import TextModel, abstract_params

    config = tiny(layers=("softmax",), num_experts=0, hidden_size=128, ffn_hidden_size=512, vocab_size=2000)
    ints = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def run(params, tokens, positions, segments):
        model = TextModel(config, params)
        return model.head(model.backbone(model.embed(tokens), positions, segments)[0])

    counted = jax.jit(run).lower(abstract_params(config), ints, ints, ints).compile().cost_analysis()["flops"]
    assert forward_flops(config, 1).total == pytest.approx(counted, rel=0.05)


def test_published_formulas():
    """recipe §1.2: relative costs at D = 6144 with 64 heads, and parameters of the 7B study models."""
    ratios = {}
    for n in (8192, 131_072, 1_048_576):
        shape = {"num_layers": 80, "hidden_size": 6144, "num_heads": 64, "sequence_length": n}
        ratios[n] = [
            round(published_training_flops_per_token(kind, **shape) / (72 * 80 * 6144**2), 2)
            for kind in ("softmax", "lightning", "hybrid")
        ]
    assert ratios == {8192: [1.22, 1.01, 1.03], 131_072: [4.56, 1.01, 1.45], 1_048_576: [29.44, 1.01, 4.56]}
    study = {"num_layers": 32, "hidden_size": 4096, "num_heads": 32}
    assert published_parameters("softmax", **study) == pytest.approx(6476.5e6, rel=6e-3)
    assert published_parameters("lightning", **study) == pytest.approx(6509.6e6, rel=6e-3)
    with pytest.raises(ValueError, match="'dense'"):
        published_parameters("dense", **study)


def test_pairs_of_a_ragged_sequence():
    """Pairs inside chunks, by drawing the mask."""
    index = np.arange(23)
    mask = (index[:, None] >= index) & (index[:, None] // 5 == index // 5)
    assert causal_pairs(23, 5) == mask.sum()
    with pytest.raises(ValueError, match="must be positive"):
        causal_pairs(0, 5)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("cpu", None),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v5 lite", 197e12),
     ("TPU v6 lite", 918e12)],
)  # fmt: skip
def test_peaks_by_device_kind(kind, peak):
    """Dense bf16 peaks; None where an MFU would mean nothing."""
    assert peak_flops(kind) == peak


def test_units():
    """Binary for memory, decimal for FLOPs."""
    assert [readable_bytes(n) for n in (100, 280 * 2**20, 3 * 2**50)] == ["100 B", "280 MiB", "3.0 PiB"]
    assert [readable_flops(n) for n in (12, 4.35e12, 2e15)] == ["12 FLOP", "4.35 TFLOP", "2 PFLOP"]
