"""Load a model onto processes that share it: each reads from the files only its slices of the weights.

A `PendingModel` is made on the meta device, where weights have shapes and no values. It is sharded there, and
`load` gives it memory and reads. Which weights of the files are which of the model is decided by the rules of
transformers: names that changed, prefixes of base models, experts that are stacked.
"""

from __future__ import annotations

import contextlib
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from tutelage.errors import UserError, one_line
from tutelage.hub_access import check_downloads, reading_hub
from tutelage.models.directory import check_config, is_local, weight_files
from tutelage.models.hub import body_and_head, errors_of_loading
from tutelage.models.sharding import materialise, own_rows
from tutelage.models.weight_names import check_names, not_finite, two_weights
from tutelage.records import read_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point types as safetensors spells them."""
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def describe(
    path_or_hub_name: str | Path,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PendingModel:
    """Make a causal language model on the meta device, and find the files with its weights.

    Args:
        path_or_hub_name: a directory is preferred to a Hub name that is spelled the same.
        revision: commit or tag on the Hub.
        dtype: of the weights; None keeps what was saved.
        attn_implementation: how attention is computed; None leaves the choice to transformers.

    Raises:
        UserError: as `hub.load`, as far as that can be known without the weights.
    """
    name = str(path_or_hub_name)
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    local = is_local(path_or_hub_name)
    access = contextlib.nullcontext() if local else reading_hub(f"model {name}", explains=False)
    with errors_of_loading(name, attn_implementation), access:
        files = weight_files(Path(name)) if local else _downloaded_files(name, revision)
        config = AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False, return_dict=True
        )
        dtype = dtype or config.get_text_config().dtype or config.dtype or _first_dtype(files)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
        keep_float32(model, model.dtype)
    body_and_head(model)
    return PendingModel(name, model, tuple(files), tuple(get_model_conversion_mapping(model)))


@dataclass(frozen=True, slots=True)
class PendingModel:
    """A model on the meta device, and the files with its weights.

    Attributes:
        name: directory or Hub name, for messages.
        model: to be sharded, or not, before its weights are loaded.
        files: in safetensors format.
        transforms: how checkpoints of the family differ from its modules.
    """

    name: str
    model: PreTrainedModel
    files: tuple[Path, ...]
    transforms: tuple[WeightTransform, ...]

    @torch.no_grad()
    def load(self, device: torch.device) -> PreTrainedModel:
        """Give the model memory on `device`, and read this process's slices of the weights into it.

        All processes call this at the same time. None ever holds more than its slices and one weight: as it
        is read, or where several of the files make one of the model, whole.

        Returns:
            The same model, in eval mode.

        Raises:
            UserError: weights are missing, of another shape than config.json says, or not finite; on every
                process, wherever the damage lies.
        """
        model = self.model
        materialise(model, device)
        weights: dict[str, Tensor] = model.state_dict(keep_vars=True)
        filled: dict[int, str] = {}  # by identity: tied names are one tensor
        twice: list[tuple[str, str]] = []  # names of one weight that the files hold under both
        damaged: set[str] = set()
        with contextlib.ExitStack() as opened:
            files = _Files([opened.enter_context(safe_open(path, "pt")) for path in self.files])
            sources, unexpected = self._sources(files, weights)
            for target, source in sources.items():
                for name, value in self._values(files, target, source, weights).items():
                    if name not in weights:
                        unexpected.add(name)
                        continue
                    weight, local = weights[name], _local(weights[name])
                    if id(weight) in filled:
                        twice.append((filled[id(weight)], name))
                        damaged |= set() if torch.equal(local, value.to(local)) else {name}
                        continue
                    filled[id(weight)] = name
                    local.copy_(value)
                    if isinstance(weight, nn.Parameter) and not torch.isfinite(local).all():
                        damaged.add(name)
        self._check(weights, filled, unexpected, twice, _anywhere(damaged, list(weights), device))
        for weight in weights.values():
            weight._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001 - so it is left alone
        try:
            model.initialize_weights()  # what is in no file: positions, and the like
        except Exception as error:  # noqa: BLE001 - what a family does there is its own
            family, reason = type(model).__name__, one_line(error)
            raise UserError(f"{self.name}: processes cannot share a {family}: {reason}") from None
        return model.eval()

    def _check(
        self,
        weights: dict[str, Tensor],
        filled: dict[int, str],
        unexpected: set[str],
        twice: Sequence[tuple[str, str]],
        damaged: set[str],
    ) -> None:
        """Refuse a model of which weights are missing, left over, damaged or contradictory."""
        missing = {name for name, weight in weights.items() if id(weight) not in filled}
        found = LoadStateDictInfo(missing, unexpected, set(), [], {}, set())
        self.model._adjust_missing_and_unexpected_keys(found)  # noqa: SLF001 - what a family leaves out
        check_names(self.model, found.missing_keys, found.unexpected_keys, self.name)
        for first, second in twice:
            if second in damaged:
                raise UserError(two_weights(self.name, first, second))
        if damaged:
            raise UserError(not_finite(self.name, min(damaged)))

    def _sources(self, files: _Files, weights: dict[str, Tensor]) -> tuple[dict[str, _Source], set[str]]:
        """What the weights of the model are made of, and the names in the files that are none of its."""
        renamings = [one for one in self.transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in self.transforms if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix = self.model.base_model_prefix
        sources: dict[str, _Source] = {}
        unexpected: set[str] = set()
        for key in files:
            target, pattern = rename_source_key(key, renamings, converters, prefix, weights)
            if target not in weights and key in weights:
                target, pattern = rename_source_key(key, [], [], prefix, weights)
            if target not in weights:
                unexpected.add(target)
                continue
            source = sources.setdefault(target, _Source(None if pattern is None else by_pattern[pattern]))
            source.keys.setdefault(pattern or "", []).append(key)
        return sources, unexpected

    def _values(
        self, files: _Files, target: str, source: _Source, weights: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """This process's slices of the weights that a source makes: one, or several that it is split into."""
        weight = weights[target]
        rows = own_rows(weight) if weight.ndim else slice(None)
        if source.converter is None:
            (key, *_) = source.keys[""]
            if files.shape(key) != weight.shape:
                raise UserError(
                    f"{self.name}: {key} is {tuple(files.shape(key))} in its file, and config.json says "
                    f"{tuple(weight.shape)}"
                )
            return {target: files.read(key, rows)}
        converter = deepcopy(source.converter)
        stacked = source.is_stacked(weight)
        if stacked and rows.start == rows.stop:
            return {target: _local(weight)}
        for pattern, keys in source.keys.items():
            for key in keys[rows] if stacked else keys:
                # Read when it is needed, and converted in the model's dtype, as transformers does.
                converter.add_tensor(
                    target, key, pattern, lambda key=key: files.read(key, slice(None)).to(weight.dtype)
                )
        try:
            made = converter.convert(target, model=self.model, config=self.model.config)
        except Exception as error:  # noqa: BLE001 - tensors of a wrong shape can raise anything
            raise UserError(f"{self.name}: {target} cannot be made of its files: {one_line(error)}") from None
        values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        if stacked:
            return values
        return {
            name: value[own_rows(weights[name])] if name in weights else value
            for name, value in values.items()
        }


@dataclass(frozen=True, slots=True)
class _Source:
    """What a weight of the model is made of.

    Attributes:
        converter: makes weights of the model from those of the files; None: they are the same.
        keys: names in the files, by the pattern of the converter that they match.
    """

    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=dict)

    def is_stacked(self, weight: Tensor) -> bool:
        """Whether row n of a weight is made of nothing but the n-th tensor of each pattern: experts."""
        if self.converter is None:
            return False
        first, *rest = self.converter.operations
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(isinstance(step, Concatenate) and step.dim > 0 for step in rest)
            and all(len(keys) == weight.shape[0] for keys in self.keys.values())
        )


class _Files:
    """Open safetensors files as one mapping; iterated in the order that transformers stacks experts in."""

    def __init__(self, opened: Sequence[Any]) -> None:
        self._where: dict[str, Any] = {}
        for file in opened:
            self._where |= dict.fromkeys(file.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where, key=dot_natural_key))

    def shape(self, key: str) -> torch.Size:
        """Shape of a tensor."""
        return torch.Size(self._where[key].get_slice(key).get_shape())

    def read(self, key: str, rows: slice) -> Tensor:
        """Read some rows of a tensor."""
        file = self._where[key]
        found: Tensor = file.get_slice(key)[rows] if self.shape(key) else file.get_tensor(key)
        return found


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _anywhere(found: set[str], names: Sequence[str], device: torch.device) -> set[str]:
    """The names that any process has found."""
    if not distributed.is_initialized():
        return found
    flags = torch.tensor([name in found for name in names], dtype=torch.int32, device=device)
    distributed.all_reduce(flags)
    return {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}


def _downloaded_files(name: str, revision: str | None) -> list[Path]:
    """Download the weights of a model on the Hub, if they are not here yet."""

    def download(file: str) -> Path:
        path = Path(hf_hub_download(name, file, revision=revision))
        check_downloads(name, [path])
        return path

    check_config(read_object(download("config.json")), f"{name}: config.json")
    try:
        places = read_object(download(_INDEX)).get("weight_map", {})
    except EntryNotFoundError:
        return [download(_SINGLE)]
    return [download(file) for file in sorted(set(places.values()))]


def _first_dtype(files: Sequence[Path]) -> torch.dtype:
    """Read the dtype of the first floating-point tensor, for a config that names none."""
    with safe_open(files[0], "pt") as file:
        found = (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118 - no iterator
        return next((_DTYPES[dtype] for dtype in found if dtype in _DTYPES), torch.float32)


def keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make those weights float32 that a family wants so whatever the dtype of the others is: routers."""
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001 - the only place that knows
    if not plan:
        return
    wanted, _, by_group = build_glob_alternation(list(plan))
    for name, weight in list(model.state_dict(keep_vars=True).items()):
        if (match := wanted.search(name)) is None:
            continue
        parent, _, leaf = name.rpartition(".")
        kept = torch.empty_like(weight, dtype=plan[by_group[match.lastgroup]])
        is_parameter = isinstance(weight, nn.Parameter)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(kept) if is_parameter else kept)
