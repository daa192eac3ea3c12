"""GPT-2 as an OpenVINO graph with a state, as its own exporters lay a decoder out: the GGUF reader knows no GPT-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
from openvino import opset13 as ov  # pyright: ignore[reportMissingImports]
from openvino.op.util import Variable, VariableInfo  # pyright: ignore[reportMissingImports]
from safetensors.numpy import load_file


class _Graph:
    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        self.heads, self.width, self.eps = config["n_head"], config["n_embd"], config["layer_norm_epsilon"]
        self.tensors, self.sinks = tensors, []

    def linear(self, x: Any, name: str) -> Any:
        """As nn.Linear keeps it, (out, in): stored the other way round, the plug-in would turn it at load."""
        weight = ov.constant(np.ascontiguousarray(self.tensors[f"{name}.weight"].T), name=f"{name}.weight")
        return ov.add(ov.matmul(x, weight, False, True), ov.constant(self.tensors[f"{name}.bias"][None, None]))

    def norm(self, x: Any, name: str) -> Any:
        scaled = ov.mvn(x, ov.constant(np.array([-1])), True, self.eps, "INSIDE_SQRT")
        weight, bias = (ov.constant(self.tensors[f"{name}.{end}"][None, None]) for end in ("weight", "bias"))
        return ov.add(ov.multiply(scaled, weight), bias)

    def cached(self, new: Any, name: str, rows: Any) -> Any:
        """(B, H, past + S, D): what is kept, by the rows' origins, and the new keys or values behind it."""
        shape = openvino.PartialShape([-1, self.heads, -1, self.width // self.heads])
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, openvino.Type.f32, name
        variable = Variable(info)
        batch = ov.gather(ov.shape_of(self.ids), ov.constant(np.array([0])), ov.constant(0))
        sizes = [ov.constant(np.array([n])) for n in (self.heads, 0, self.width // self.heads)]
        empty = ov.broadcast(ov.constant(np.float32(0)), ov.concat([batch, *sizes], 0))
        kept = ov.gather(ov.read_value(empty, variable), rows, ov.constant(0))
        both = ov.concat([kept, new], 2)
        self.sinks.append(ov.assign(both, variable))
        return both

    def block(self, x: Any, i: int, mask: Any, rows: Any) -> Any:
        fused = self.linear(self.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        parts = ov.split(fused, ov.constant(-1), 3).outputs()
        split = ov.constant(np.array([0, 0, self.heads, self.width // self.heads]))
        turn = ov.constant(np.array([0, 2, 1, 3]))
        q, k, v = (ov.transpose(ov.reshape(part, split, True), turn) for part in parts)
        k, v = self.cached(k, f"past_key_values.{i}.key", rows), self.cached(v, f"past_key_values.{i}.value", rows)
        mixed = ov.transpose(ov.scaled_dot_product_attention(q, k, v, mask), turn)
        mixed = ov.reshape(mixed, ov.constant(np.array([0, 0, self.width])), True)
        x = ov.add(x, self.linear(mixed, f"h.{i}.attn.c_proj"))
        up = ov.gelu(self.linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), "tanh")
        return ov.add(x, self.linear(up, f"h.{i}.mlp.c_proj"))

    def model(self, layers: int) -> openvino.Model:
        names = "input_ids", "attention_mask", "position_ids"
        inputs = [ov.parameter([-1, -1], np.int64, name=name) for name in names]
        inputs.append(ov.parameter([-1], np.int32, name="beam_idx"))
        for node in inputs:
            node.output(0).set_names({node.friendly_name})
        self.ids, attended, positions, rows = inputs
        table = ov.constant(self.tensors["wte.weight"], name="wte.weight")
        at = ov.gather(ov.constant(self.tensors["wpe.weight"]), positions, ov.constant(0))
        x = ov.add(ov.gather(table, self.ids, ov.constant(0)), at)
        # A query sees the keys up to its own place, which is counted from the end: all tokens but the new are kept.
        every = ov.gather(ov.shape_of(attended), ov.constant(1), ov.constant(0))
        new = ov.gather(ov.shape_of(self.ids), ov.constant(1), ov.constant(0))
        keys = ov.range(ov.constant(0), every, ov.constant(1), "i64")
        queries = ov.range(ov.subtract(every, new), every, ov.constant(1), "i64")
        sees = ov.less_equal(ov.unsqueeze(keys, ov.constant(0)), ov.unsqueeze(queries, ov.constant(1)))
        mask = ov.select(sees, ov.constant(np.float32(0)), ov.constant(np.float32(-np.inf)))
        mask = ov.unsqueeze(mask, ov.constant(np.array([0, 1])))
        for i in range(layers):
            x = self.block(x, i, mask, rows)
        logits = ov.result(ov.matmul(self.norm(x, "ln_f"), table, False, True))
        logits.get_output_tensor(0).set_names({"logits"})
        return openvino.Model([logits], self.sinks, inputs, "gpt2")


def graph(folder: Path) -> openvino.Model:
    """The model in a Hugging Face folder."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return _Graph(config, tensors).model(config["n_layer"])
