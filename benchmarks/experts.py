"""Published shapes of mixtures of experts and hybrids, with random weights, over daemons on this machine.

    python -m benchmarks.experts --shape qwen3-30b-fp8 [--blocks 9] [--peers 3] [--threads 2] [--rounds 3]
                                 [--context 100 8000] [--clients 1 8] [--prefill 512] [--tokens 48]

The benchmark generates a checkpoint with the sizes of the named model, but fewer blocks and a small vocabulary (`--keep
FOLDER` keeps it). Prints the bytes of the blocks in the files, and the memory of the daemons without that of the
libraries; then, for every case, tokens per second and ms per token. "Of bandwidth": the time that the machine needs to
read the bytes that a token really reads (attention, router, chosen experts, head), as a share of the time per token.
This reading is timed with as many threads as a daemon has, before and after the rounds; the faster time counts.
`--in-process` also runs all blocks as one span in this process, without hops; `--sequences N` prints the memory of N
more sequences of each context in the daemons, and `--drafts` compares answers with and without drafts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from splitnet.blocks.model_sizes import ModelSizes
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import LocalSwarm
from splitnet.cli.stage_progress import StageProgress
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.bench.backends import Clock, SwarmArm
from splitnet.tools.bench.report import FIRST_TOKEN_MS, TOKEN_MS_P50, TOKENS_PER_S, Case, Measured, measure, with_range

MIB = 2**20
VOCABULARY = 4096
READ_BYTES = 2**29
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model.

    Attributes:
        family: its `model_type`.
        config: values of its config.
        store: returns the tensors of a linear layer, by the end of their names.
        quantization: the config's `quantization_config`.
        chosen: number of experts that are chosen for a token.
        experts: number of all experts.
        stacked: returns the tensors of all experts at once, for checkpoints that store them together.
    """

    family: str
    config: Mapping[str, Any]
    store: Callable[[int, int], Tensors]
    quantization: Mapping[str, Any] | None
    chosen: int
    experts: int
    stacked: Callable[[int, int, int], Tensors] | None = None


def bfloat16(outputs: int, inputs: int) -> Tensors:
    return {"weight": (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()}


def fp8(outputs: int, inputs: int) -> Tensors:
    codes = (torch.randn(outputs, inputs) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.full((ceil(outputs / 128), ceil(inputs / 128)), inputs**-0.5 / 100)
    return {"weight": codes, "weight_scale_inv": scales}


def int4(outputs: int, inputs: int) -> Tensors:
    return {
        "weight_packed": torch.randint(-(2**31), 2**31, (outputs, inputs // 8)).to(torch.int32),
        "weight_scale": torch.full((outputs, inputs // 32), inputs**-0.5 / 4).bfloat16(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }


def mxfp4_packed(outputs: int, inputs: int) -> Tensors:
    return {
        "weight_packed": torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8),
        "weight_scale": torch.full((outputs, inputs // 32), 127 - 7, dtype=torch.uint8),
    }


def mxfp4(experts: int, outputs: int, inputs: int) -> Tensors:
    return {
        "_blocks": torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8),
        "_scales": torch.full((experts, outputs, inputs // 32), 127 - 7, dtype=torch.uint8),
        "_bias": torch.zeros(experts, outputs, dtype=torch.bfloat16),
    }


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FOUR_BITS = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}


def compressed(format: str, kind: str) -> dict[str, Any]:
    """The config of four-bit weights in the format of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": FOUR_BITS | {"type": kind}}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


INT4, MXFP4 = compressed("pack-quantized", "int"), compressed("mxfp4-pack-quantized", "float")
QWEN3: Mapping[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
NEXT: Mapping[str, Any] = {
    **QWEN3,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
OSS: Mapping[str, Any] = {
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
}
SHAPES = {
    "qwen3-30b-int4": Shape("qwen3_moe", QWEN3, int4, INT4, 8, 128),
    "qwen3-30b-fp8": Shape("qwen3_moe", QWEN3, fp8, FP8, 8, 128),
    "qwen3-30b-mxfp4": Shape("qwen3_moe", QWEN3, mxfp4_packed, MXFP4, 8, 128),
    "gpt-oss-20b-mxfp4": Shape("gpt_oss", OSS, bfloat16, {"quant_method": "mxfp4"}, 4, 32, mxfp4),
    "qwen3-next-int4": Shape("qwen3_next", NEXT, int4, INT4, 10, 512),
}


def write(shape: Shape, blocks: int, folder: Path) -> None:
    """Writes a checkpoint whose blocks all have the same weights."""
    config = AutoConfig.for_model(
        shape.family, **shape.config, num_hidden_layers=blocks, vocab_size=VOCABULARY, dtype="bfloat16", use_cache=True
    )
    stored = config.to_dict() | {"quantization_config": shape.quantization, "architectures": None}
    (folder / "config.json").write_text(json.dumps(stored))
    hidden = config.hidden_size
    weight_map: dict[str, str] = {}

    def save(shard: str, tensors: Tensors) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))

    def norm(size: int, value: float = 1.0) -> torch.Tensor:
        return torch.full((size,), value, dtype=torch.bfloat16)

    kinds = getattr(config, "layer_types", None) or ["full_attention"] * blocks
    made: dict[str, Tensors] = {}
    for index in range(blocks):
        if kinds[index] not in made:
            made[kinds[index]] = block(shape, config, kinds[index], norm)
        save(
            f"block-{index}.safetensors", {f"model.layers.{index}.{name}": t for name, t in made[kinds[index]].items()}
        )
    ends = {"model.embed_tokens.weight": bfloat16(VOCABULARY, hidden)["weight"] * hidden**0.5 * 0.5}
    ends |= {"lm_head.weight": bfloat16(VOCABULARY, hidden)["weight"], "model.norm.weight": norm(hidden)}
    save("ends.safetensors", ends)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def block(shape: Shape, config: Any, kind: str, norm: Callable[..., torch.Tensor]) -> Tensors:
    """The tensors of one block, by the last part of their names."""
    hidden, size = config.hidden_size, config.head_dim
    next_ = shape.family == "qwen3_next"
    one = 0.0 if next_ else 1.0  # norms of this family add one to their weight
    tensors = {f"{name}_layernorm.weight": norm(hidden, one) for name in ("input", "post_attention")}

    def add(path: str, found: Tensors) -> None:
        tensors.update({f"{path}.{end}" if end[0] != "_" else path + end: value for end, value in found.items()})

    if kind == "linear_attention":
        keys = config.linear_key_head_dim * config.linear_num_key_heads
        values = config.linear_value_head_dim * config.linear_num_value_heads
        add("linear_attn.in_proj_qkvz", shape.store(2 * keys + 2 * values, hidden))
        add("linear_attn.in_proj_ba", bfloat16(2 * config.linear_num_value_heads, hidden))
        add("linear_attn.out_proj", shape.store(hidden, values))
        tensors["linear_attn.conv1d.weight"] = (torch.randn(2 * keys + values, 1, 4) / 2).bfloat16()
        tensors["linear_attn.A_log"] = torch.rand(config.linear_num_value_heads).bfloat16()
        tensors["linear_attn.dt_bias"] = norm(config.linear_num_value_heads)
        tensors["linear_attn.norm.weight"] = norm(config.linear_value_head_dim)
    else:
        own, shared = config.num_attention_heads * size, config.num_key_value_heads * size
        sizes = {"q": (2 * own if next_ else own, hidden), "k": (shared, hidden), "v": (shared, hidden)}
        for name, (outputs, inputs) in (sizes | {"o": (hidden, own)}).items():
            add(f"self_attn.{name}_proj", shape.store(outputs, inputs))
            if shape.family == "gpt_oss":
                tensors[f"self_attn.{name}_proj.bias"] = norm(outputs, 0.0)
        if shape.family == "gpt_oss":
            tensors["self_attn.sinks"] = norm(config.num_attention_heads, 0.0)
        else:
            tensors |= {f"self_attn.{name}_norm.weight": norm(size, one) for name in ("q", "k")}
    if shape.stacked is not None:
        middle = config.intermediate_size
        add("mlp.router", bfloat16(shape.experts, hidden) | {"bias": norm(shape.experts, 0.0)})
        add("mlp.experts.gate_up_proj", shape.stacked(shape.experts, 2 * middle, hidden))
        add("mlp.experts.down_proj", shape.stacked(shape.experts, hidden, middle))
        return tensors
    middle = config.moe_intermediate_size
    add("mlp.gate", bfloat16(shape.experts, hidden))
    for expert in range(shape.experts):
        for name in ("gate", "up"):
            add(f"mlp.experts.{expert}.{name}_proj", shape.store(middle, hidden))
        add(f"mlp.experts.{expert}.down_proj", shape.store(hidden, middle))
    if next_:
        middle = config.shared_expert_intermediate_size
        add("mlp.shared_expert_gate", bfloat16(1, hidden))
        for name in ("gate", "up"):
            add(f"mlp.shared_expert.{name}_proj", shape.store(middle, hidden))
        add("mlp.shared_expert.down_proj", shape.store(hidden, middle))
    return tensors


def bytes_read(checkpoint: Checkpoint, shape: Shape) -> tuple[int, int]:
    """Bytes of the blocks in the files, and bytes of blocks and head that a token reads."""
    in_files = read = 0
    for tensors in checkpoint.block_tensors:
        facts = checkpoint.store.tensor_facts([tensor.name for tensor in tensors])
        for name, fact in facts.items():
            in_files += fact.nbytes
            read += fact.nbytes * shape.chosen // shape.experts if ".experts." in name else fact.nbytes
    head = checkpoint.store.tensor_facts(["lm_head.weight"])["lm_head.weight"].nbytes
    return in_files, read + head


def bandwidth(threads: int) -> float:
    """Bytes per second of a sum over a long vector; the fastest of several."""
    torch.set_num_threads(threads)
    vector = torch.ones(READ_BYTES // 4)
    times: list[float] = []
    for _ in range(8):
        began = time.perf_counter()
        vector.sum()
        times.append(time.perf_counter() - began)
    return READ_BYTES / min(times)


def libraries_bytes() -> int:
    """Memory of a process that has only imported a daemon's modules."""
    code = "import peers.running_peer, splitnet.cli.text_generator; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        used = psutil.Process(process.pid).memory_full_info().uss
        process.communicate(b"\n")
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of each daemon; one daemon works at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--context", type=int, nargs="+", default=[100])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512])
    parser.add_argument("--keep", type=Path, help="folder for the checkpoint, or with an existing one")
    parser.add_argument("--sequences", type=int, default=0, help="number of sequences whose memory is measured")
    parser.add_argument("--drafts", action="store_true", help="answer a prompt that repeats itself with drafts, too")
    parser.add_argument("--in-process", action="store_true", help="time a span of all blocks, too")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    with ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").exists():
            folder.mkdir(exist_ok=True)
            write(shape, arguments.blocks, folder)
        run(shape, folder, arguments, stack)


def run(shape: Shape, folder: Path, arguments: argparse.Namespace, stack: ExitStack) -> None:
    checkpoint = Checkpoint.open(folder)
    in_files, read = bytes_read(checkpoint, shape)
    speed = bandwidth(arguments.threads)
    libraries = libraries_bytes()
    daemons = stack.enter_context(LocalSwarm(str(folder), arguments.peers, ("--threads", str(arguments.threads))))
    began = time.monotonic()
    address = daemons.wait()
    ready = time.monotonic() - began
    held = sum(psutil.Process(process.pid).memory_full_info().uss - libraries for process in daemons.processes)
    print(
        f"{arguments.shape}, {checkpoint.num_blocks} blocks, {arguments.peers} daemons of {arguments.threads} threads."
    )
    print(f"Ready after {ready:.0f} s.")
    print(f"Blocks: {in_files / MIB:.0f} MiB in files; daemons without libraries: {held / MIB:.0f} MiB", end="")
    print(f" ({held / in_files:.2f} x). A token reads {read / MIB:.0f} MiB.")
    swarm = stack.enter_context(Swarm(ModelFacts.of(checkpoint), [address]))
    torch.set_num_threads(arguments.threads)
    model = attach(checkpoint, swarm, codec="none")
    arm = SwarmArm(model, seed=0)
    with StageProgress() as progress:
        found = measure(
            {"swarm": arm}, cases_of(arguments), rounds=arguments.rounds, progress=progress.update, warm_up=1
        )
    speed = max(speed, bandwidth(arguments.threads))  # the machine's speed varies
    print(f"Memory is read at {speed / 2**30:.1f} GiB/s with {arguments.threads} threads.")
    report(found, read / speed * 1000)
    for context in arguments.context if arguments.sequences else []:
        report_memory(model, daemons, ModelSizes.of(str(folder)), context, arguments.sequences)
    if arguments.drafts:
        report_drafts(model, arguments.tokens, arguments.rounds)
    if arguments.in_process:
        daemons.__exit__(None, None, None)  # the memory may not suffice for daemons and this span
        blocks_ms = decode_ms(checkpoint, arguments.tokens)
        of_blocks = read - checkpoint.store.tensor_facts(["lm_head.weight"])["lm_head.weight"].nbytes
        print(f"\nAll blocks in one process: {blocks_ms:.2f} ms per token, {of_blocks / speed * 1000 / blocks_ms:.0%}.")


def report_memory(model: RemoteCausalLM, daemons: LocalSwarm, sizes: ModelSizes, context: int, many: int) -> None:
    """Prints the memory that concurrent sequences add to the daemons, and the memory computed from the model's
    sizes."""
    prompt = torch.randint(VOCABULARY, (1, context))
    with ExitStack() as open_sessions:
        used: list[int] = []
        for index in range(many + 1):
            open_sessions.enter_context(model.session())
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False)
            if index in (0, many):  # the first sequence also allocates memory for passes, which stays
                used.append(sum(psutil.Process(process.pid).memory_full_info().uss for process in daemons.processes))
    states = sizes.num_blocks * sizes.state_bytes / MIB
    told = sizes.num_blocks * sizes.kv_bytes * (context + 2) / MIB + states
    grown = (used[1] - used[0]) / many / MIB
    print(f"A sequence of {context} takes {grown:.1f} MiB; computed: {told:.1f} MiB, of which {states:.1f} are states.")


def report_drafts(model: RemoteCausalLM, tokens: int, rounds: int) -> None:
    prompt = torch.randint(VOCABULARY, (1, 32)).repeat(1, 3)
    texts: set[tuple[int, ...]] = set()
    speeds: dict[str | None, list[float]] = {None: [], "prompt-lookup": []}
    for index in range(rounds + 1):
        for speculate, found in speeds.items():
            clock = Clock()
            text = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=clock,
                speculate=speculate,
            )
            texts.add(tuple(text[0].tolist()))
            if index:  # the first round warms up
                found.append(1000 * (clock.times[-1] - clock.times[0]) / (tokens - 1))
    off, drafts = (statistics.median(found) for found in speeds.values())
    same = "the same text" if len(texts) == 1 else "ANOTHER TEXT"
    print(f"A token takes {off:.1f} ms without drafts and {drafts:.1f} with them; {same}.", flush=True)


def decode_ms(checkpoint: Checkpoint, tokens: int) -> float:
    """The median of a decode step through a span of all blocks, after 100 positions."""
    span = Span.load(checkpoint, 0, checkpoint.num_blocks)
    hidden = torch.randn(100, span.hidden_size)
    row = span.new_row(100 + tokens)
    span.forward(hidden, [RowChunk(row, 0, 100)])
    times: list[float] = []
    for _ in range(tokens):
        began = time.perf_counter()
        span.forward(hidden[:1], [RowChunk(row, row.length, 1)])
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    cases = [Case(tokens) for tokens in arguments.prefill]
    for context in arguments.context:
        cases += [Case(arguments.tokens, True, context, clients) for clients in arguments.clients]
    return cases


def report(found: Sequence[Measured], read_ms: float) -> None:
    print("\n| case | context | clients | tokens/s | ms per token | of bandwidth | ms to the first token |")
    print("|---|---|---|---|---|---|---|")
    for measured in found:
        case, spreads = measured.case, measured.spreads("swarm")
        cells = [case.name, str(case.context), str(case.clients), with_range(spreads[TOKENS_PER_S])]
        if case.decodes:
            each = spreads[TOKEN_MS_P50].median
            cells += [f"{each:.2f}", f"{read_ms / each:.0%}" if case.clients == 1 else ""]
        else:
            cells += ["", ""]
        print(f"| {' | '.join([*cells, f'{spreads[FIRST_TOKEN_MS].median:.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
