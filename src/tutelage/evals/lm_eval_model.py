"""Adapt lm-eval's model class: documents begin as they do in training, and padded ids get no probability.

lm-eval itself puts a mark in front of every text that it scores from its beginning: the tokenizer's beginning
of a sequence, or without one the end-of-text mark. Here such a text begins with the tokens that the tokenizer
puts in front of it, once; if there are none, the first token is context only. And no text is closed, whatever
the tokenizer puts behind one: prompts are continued.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from tutelage.errors import UserError, one_line
from tutelage.evals.evaluated_model import padded_ids
from tutelage.models.export import all_ends

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tutelage.data.tokenizer import TextTokenizer

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts, as a key of lm-eval's cache; ids that are context; ids that are scored."""


class _Told(CacheHook):  # type: ignore[misc] # as below
    """Counts finished requests, where lm-eval would put each into a cache of its own."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        super().__init__(None)
        self._advance = advance

    def add_partial(self, *_: object) -> None:
        """Count one."""
        self._advance(1)


class ChatWriter(HFLM):  # type: ignore[misc] # as below
    """Writes conversations by a chat template as lm-eval does, for which it needs no weights.

    Args:
        tokenizer: with the one template that is meant.
        model: its directory, for messages.

    Attributes:
        unheard: whether a system message was left out, by the template or by lm-eval, which leaves out those
            that a template refuses.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        self.tokenizer = tokenizer
        self.chat_template_args: dict[str, Any] = {}
        self.unheard = False
        self._name = model

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text.

        Raises:
            UserError: the template fails.
        """
        try:
            text: str = super().apply_chat_template(chat_history, add_generation_prompt)
            text.encode()
        except Exception as error:  # noqa: BLE001 - a template is a program, which can fail in any way
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{self._name}: its chat template refuses a prompt ({reason})") from None
        system = (turn["content"].strip() for turn in chat_history if turn["role"] == "system")
        self.unheard |= any(content not in text for content in system)
        return text


class ExportedModel(HFLM):  # type: ignore[misc] # lm-eval is untyped
    """A model directory in the interface of lm-eval.

    Args:
        own: the directory's tokenizer.
        writer: writes conversations; None where questions are put as text.
        settings: of `HFLM`.

    Attributes:
        cut: task and number of each question whose prompt lost its beginning, because with an answer it is
            longer than the context.
    """

    def __init__(
        self,
        own: TextTokenizer,
        writer: ChatWriter | None = None,
        **settings: Any,  # noqa: ANN401 - lm-eval's own
    ) -> None:
        super().__init__(**settings)
        self._own = own
        self._writer = writer
        self.cut: set[tuple[str, int]] = set()
        if own.begin:  # by this name lm-eval sees that a chat template has written it already
            self.tokenizer.bos_token = own.begin[0]
        # A tokenizer that closes texts would close prompts too, and answers would lose their first token.
        self.tokenizer.backend_tokenizer.post_processor = own.library(markup=True).post_processor
        generation = self.model.generation_config
        generation.suppress_tokens = padded_ids(self.model, own.vocab_size)
        # lm-eval waits for the last of a batch, and keeps what the others write behind their ends meanwhile.
        generation.eos_token_id = all_ends(generation.eos_token_id, own.eos_id)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text."""
        assert self._writer is not None  # noqa: S101 - lm-eval asks only where conversations are written
        return self._writer.apply_chat_template(chat_history, add_generation_prompt)

    def tell(self, advance: Callable[[int], None]) -> None:
        """Have `advance` called with the number of requests that are finished, as they are."""
        self.cache_hook = _Told(advance)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of every continuation, and whether it is the model's first choice throughout.

        Raises:
            UserError: one has no tokens, or is longer than the model's context.
        """
        encoded: list[TokenRequest] = []
        for request in requests:
            context, continuation = request.args
            if context:
                given, scored = self._encode_pair(context, continuation)
            else:  # all of it is scored: answers that begin with other tokens are compared with one another
                given = [*self._own.begin_ids] or [self._own.eos_id]
                scored = self.tok_encode(continuation, add_special_tokens=False)
            if not scored:
                raise UserError(
                    f"task {request.task_name}: an answer to question {request.doc_id}, {continuation!r}, "
                    "has no token of its own: it is empty, or the tokenizer joins it with the prompt"
                )
            if len(scored) > self.max_length:
                raise UserError(
                    f"task {request.task_name}: an answer to question {request.doc_id} has {len(scored)} "
                    f"tokens and the model's context {self.max_length}; shorten it, or take another model"
                )
            if len(given) + len(scored) > self.max_length + 1:
                self.cut.add((request.task_name, request.doc_id))
            encoded.append(((context, continuation), given, scored))
        found: list[tuple[float, bool]] = self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after every prompt.

        Raises:
            UserError: it is to be longer than the model's context, and leave no room for the prompt.
        """
        for request in requests:
            longest = normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)["max_gen_toks"]
            if longest >= self.max_length:
                raise UserError(
                    f"task {request.task_name}: answers of up to {longest} tokens are asked for, and the "
                    f"model's context is {self.max_length} with the prompt; take another model, or lower "
                    "generation_kwargs.max_gen_toks in a task file of your own"
                )
            if len(self.tok_encode(request.args[0])) > self.max_length - longest:
                self.cut.add((request.task_name, request.doc_id))
        written: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return written

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of every text from its beginning, in lm-eval's windows."""
        totals = []
        for (text,) in (request.args for request in requests):
            given, scored = self._beginning(text)
            windows: list[TokenRequest] = [(None, *window) for window in self._windows(given, scored)]
            found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
            totals.append(sum(value for value, _ in found))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _model_call(self, *inputs: Any, **more: Any) -> Tensor:  # noqa: ANN401 - lm-eval's own
        logits_BTV: Tensor = super()._model_call(*inputs, **more)
        return logits_BTV[..., : self._own.vocab_size]

    def _beginning(self, text: str) -> tuple[list[int], list[int]]:
        """Context and scored ids of a text that begins a document.

        A text of one token without tokens in front is scored after the end-of-text mark, or it had no score.
        """
        ids = [*self._own.begin_ids, *self.tok_encode(text, add_special_tokens=False)]
        given = max(1, len(self._own.begin_ids))
        return (ids[:given], ids[given:]) if len(ids) != 1 else ([self._own.eos_id], ids)

    def _windows(self, given: Sequence[int], scored: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """lm-eval's windows: all are full, the last by reaching back over tokens scored before."""
        ids = [*given, *scored]
        done = len(given)
        while done < len(ids):
            room = self.max_length if done > len(given) else self.max_length + 1 - len(given)
            end = min(len(ids), done + room)
            yield ids[max(0, end - self.max_length - 1) : done], ids[done:end]
            done = end
