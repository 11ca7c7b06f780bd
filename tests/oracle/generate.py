"""Writes the goldens: transformers' MiniMax model, made fair as model.md 15.2 says, in fp32 on a CPU.

    python3.11 -m venv oracle && oracle/bin/pip install -r tests/oracle/requirements.txt
    oracle/bin/python tests/oracle/generate.py goldens tests/oracle/goldens
    oracle/bin/python tests/oracle/generate.py logits EXPORTED_FOLDER tokens.npy logits.npy

`goldens` makes one .npz for each case of weights.py. `logits` loads an exported folder as its user would, with the
patch that is in it (if there is one), fails on any message about keys, and writes the logits.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax import modeling_minimax

sys.path.insert(0, str(Path(__file__).parent))
import weights as shared

BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
_STOCK = (
    modeling_minimax.MiniMaxRotaryEmbedding.compute_default_rope_parameters,
    modeling_minimax.apply_rotary_pos_emb,
)


def partial_rope(rotary_dim):
    """Patches frequencies and application, written for the oracle alone and not shared with the package's patch."""

    def frequencies(config, device=None, seq_len=None, **kwargs):
        theta = config.rope_parameters["rope_theta"]
        return 1.0 / theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim), 1.0

    def apply(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos[:, None], sin[:, None]
        out = []
        for x in (q, k):
            head, tail = x[..., :rotary_dim], x[..., rotary_dim:]
            half = rotary_dim // 2
            turned = torch.cat([-head[..., half:], head[..., :half]], dim=-1)
            out.append(torch.cat([head * cos + turned * sin, tail], dim=-1))
        return tuple(out)

    modeling_minimax.MiniMaxRotaryEmbedding.compute_default_rope_parameters = staticmethod(frequencies)
    modeling_minimax.apply_rotary_pos_emb = apply


def stock_rope():
    """Takes the patch back."""
    modeling_minimax.MiniMaxRotaryEmbedding.compute_default_rope_parameters = staticmethod(_STOCK[0])
    modeling_minimax.apply_rotary_pos_emb = _STOCK[1]


def exact_decays(module, layer, layers):
    """Slopes with L - 1 in the denominator, as the released code has it, and the buffers that follow from them."""
    heads = module.num_attention_heads
    rate = np.array([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]) * (1 - layer / (layers - 1) + 1e-5)
    rate = torch.tensor(rate, dtype=torch.float64)[:, None, None]
    for name, value in zip(BUFFERS, (rate, *module.decay_factors(rate))):
        getattr(module, name).copy_(value.float())


def build(case):
    """The model of a case with the shared weights."""
    config = MiniMaxConfig(**{k: v for k, v in case["config"].items() if k != "model_type"})
    config._attn_implementation = "eager"
    model = MiniMaxForCausalLM(config).float().eval()
    state = model.state_dict()
    shapes = disk_shapes(case["config"])
    drawn = {name: torch.tensor(value) for name, value in shared.weights(shapes, case["seed"]).items()}
    experts = case["config"]["num_local_experts"]

    def at(name):
        return drawn[f"{name}.weight"]

    with torch.no_grad():
        for name, target in state.items():
            if name.endswith(BUFFERS):
                continue
            disk = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
            if ".mlp.experts." in name:
                prefix = name.split(".mlp.")[0] + ".block_sparse_moe.experts."
                if name.endswith("gate_up_proj"):
                    value = torch.stack(
                        [torch.cat([at(f"{prefix}{e}.{w}") for w in ("w1", "w3")]) for e in range(experts)]
                    )
                else:
                    value = torch.stack([at(f"{prefix}{e}.w2") for e in range(experts)])
            else:
                value = drawn[disk]
            assert value.shape == target.shape, name
            target.copy_(value)
        for i, layer in enumerate(model.model.layers):
            if hasattr(layer.self_attn, "slope_rate"):
                exact_decays(layer.self_attn, i, len(model.model.layers))
    return model


def disk_shapes(config):
    """Name -> shape of the tensors as they are on disk, from the table of model.md 11.1."""
    D, V, F, E = (config[k] for k in ("hidden_size", "vocab_size", "intermediate_size", "num_local_experts"))
    N, K, H = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i, kind in enumerate(config["layer_types"]):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,),
                   at + "block_sparse_moe.gate.weight": (E, D)}  # fmt: skip
        for e in range(E):
            for w, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                shapes[f"{at}block_sparse_moe.experts.{e}.{w}.weight"] = shape
        at += "self_attn."
        if kind == "linear_attention":
            shapes |= {at + "qkv_proj.weight": (3 * N * H, D), at + "output_gate.weight": (N * H, D),
                       at + "out_proj.weight": (D, N * H), at + "norm.weight": (N * H,)}  # fmt: skip
        else:
            shapes |= {at + "q_proj.weight": (N * H, D), at + "k_proj.weight": (K * H, D),
                       at + "v_proj.weight": (K * H, D), at + "o_proj.weight": (D, N * H)}  # fmt: skip
    return shapes


def disk_gradients(model, config):
    """Gradients under their names on disk, fused experts taken apart: gate rows first."""
    out = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.numpy()
        if ".mlp.experts." in name:
            prefix = name.split(".mlp.")[0] + ".block_sparse_moe.experts."
            for e in range(config["num_local_experts"]):
                if name.endswith("gate_up_proj"):
                    gate, up = np.split(grad[e], 2)
                    out[f"{prefix}{e}.w1.weight"], out[f"{prefix}{e}.w3.weight"] = gate, up
                else:
                    out[f"{prefix}{e}.w2.weight"] = grad[e]
        else:
            out[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = grad
    return out


def greedy(model, prompt):
    """Greedy continuation by full forward passes: no cache is trusted."""
    ids = torch.tensor(prompt)[None]
    with torch.no_grad():
        for _ in range(shared.GREEDY_TOKENS):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].numpy()


def golden(name, case):
    """Everything that is compared, for one case."""
    config = case["config"]
    partial_rope(config["rotary_dim"]) if config["rotary_dim"] != config["head_dim"] else stock_rope()
    model = build(case)
    tokens, mask = shared.tokens_and_mask(case)
    ids, real = torch.tensor(tokens), torch.tensor(mask)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    chosen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda m, i, o: chosen.append((o[0].detach(), o[2].detach())))
        for layer in model.model.layers
    ]
    out = model(ids, attention_mask=real, position_ids=positions, use_cache=False, output_hidden_states=True,
                output_attentions=True)  # fmt: skip
    for hook in hooks:
        hook.remove()
    states = [a for a, kind in zip(out.attentions, config["layer_types"]) if kind == "linear_attention"]
    targets = torch.roll(ids, -1, dims=1)
    weight = real * torch.roll(real, -1, dims=1)
    weight[:, -1] = 0
    losses = torch.nn.functional.cross_entropy(out.logits.transpose(1, 2), targets, reduction="none")
    ((losses * weight).sum() / weight.sum()).backward()
    logits = torch.stack([c[0] for c in chosen]).reshape(len(chosen), *tokens.shape, -1)
    data = {
        "logits": out.logits.detach(),
        "hidden": torch.stack(out.hidden_states).detach(),
        "states": torch.stack(states).detach(),
        "router": torch.stack([c[1] for c in chosen]).reshape(len(chosen), *tokens.shape, -1).to(torch.uint8),
        "router_logits": logits,
        "loss": ((losses * weight).sum() / weight.sum()).detach(),
    }
    data = {key: value.numpy() for key, value in data.items()}
    first = int(case["left_padding"][0])
    data["greedy"] = greedy(model, tokens[0, first:]).astype(np.uint8)
    for key, grad in disk_gradients(model, config).items():
        if name == shared.FULL_GRADIENTS:
            data[f"grad/{key}"] = grad
        else:
            dots = [float((grad.astype(np.float64) * shared.direction(key, grad.shape, n)).sum())
                    for n in range(shared.PROJECTIONS)]  # fmt: skip
            data[f"grad/{key}"] = np.array([np.linalg.norm(grad.astype(np.float64)), *dots])
    return data


def exported_logits(folder, tokens_file, output):
    """Logits of an exported folder, loaded as its user loads it."""
    patch = Path(folder) / "minimax_partial_rope.py"
    if patch.is_file():
        spec = importlib.util.spec_from_file_location("minimax_partial_rope", patch)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.apply()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise SystemExit(f"{folder}: loaded with problems: {problems}")
    with torch.no_grad():
        ids = torch.tensor(np.load(tokens_file), dtype=torch.int64)
        np.save(output, model(ids, use_cache=False).logits.numpy())


def main(argv):
    """Runs one command."""
    assert transformers.__version__ == "5.23.0", transformers.__version__
    torch.set_num_threads(1)
    if argv[1] == "logits":
        exported_logits(*argv[2:])
        return
    output = Path(argv[2])
    output.mkdir(parents=True, exist_ok=True)
    for name, case in shared.CASES.items():
        np.savez_compressed(output / f"{name}.npz", **golden(name, case))


if __name__ == "__main__":
    main(sys.argv)
