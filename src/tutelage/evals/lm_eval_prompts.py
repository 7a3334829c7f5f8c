"""How questions are put to a model: as text, or in a conversation by the model's chat template.

lm-eval writes both; there it is `--apply_chat_template`, `--system_instruction`, `--fewshot_as_multiturn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tutelage.errors import UserError, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

    from tutelage.data.tokenizer import TextTokenizer
    from tutelage.evals.lm_eval_model import ChatWriter


@dataclass(frozen=True, slots=True)
class Prompting:
    """How questions are put.

    Attributes:
        chat: in a conversation, by the chat template of the model's tokenizer.
        template: name of that template where the tokenizer has several; None: its default one.
        multiturn: worked examples are turns of the conversation, else text in one turn with the question.
        system: instruction before all else: a system message, or text without a conversation.

    Raises:
        UserError: something is set that a conversation alone has.
    """

    chat: bool = False
    template: str | None = None
    multiturn: bool = True
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.chat and self.template is not None:
            raise UserError(f"chat template {self.template!r}: named, but questions are put as text")
        if not self.chat and not self.multiturn:
            raise UserError(
                "worked examples have turns in a conversation alone: apply the chat template as well"
            )

    def domain(self, name: str, tasks: Sequence[Task]) -> str:
        """The name of the scores of a task, or of a group, which says what differs from plain text.

        Documents that are scored from their beginning have no prompt, whatever is asked for.
        """
        chat = "chat" if self.template is None else f"chat {self.template}"
        said = [
            *([chat] if self.chat else []),
            *([] if self.multiturn else ["one turn"]),
            *(["system"] if self.system else []),
        ]
        prompted = any(task.OUTPUT_TYPE != "loglikelihood_rolling" for task in tasks)
        return f"{name} ({', '.join(said)})" if said and prompted else name


PLAIN = Prompting()
"""Questions as text."""


class Asked(NamedTuple):
    """Which questions of a task are asked, and how.

    Attributes:
        limit: questions per task, the first ones; None for all.
        prompting: how they are put.
        writer: writes conversations; None where questions are put as text.
    """

    limit: int | None = None
    prompting: Prompting = PLAIN
    writer: ChatWriter | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What lm-eval calls it, as arguments of its `evaluate` and of `Task.build_all_requests`."""
        return {
            "limit": self.limit,
            "apply_chat_template": self.prompting.chat,
            "fewshot_as_multiturn": self.prompting.chat and self.prompting.multiturn,
            "system_instruction": self.prompting.system,
        }


def chat_writer(model: Path, prompting: Prompting) -> ChatWriter | None:
    """What writes conversations for a model; None where questions are put as text.

    Raises:
        UserError: its tokenizer has no chat template, or none of that name; or it has no place for the
            system instruction, which lm-eval would leave out.
    """
    if not prompting.chat:
        return None
    from tutelage.evals.lm_eval_model import ChatWriter  # noqa: PLC0415 - an extra, and slow to import

    tokenizer = open_tokenizer(model)
    template = chosen_template(tokenizer.chat_template, prompting.template, model)
    tokenizer.chat_template = template
    writer = ChatWriter(tokenizer, str(model))
    if prompting.system:
        system = {"role": "system", "content": prompting.system}
        writer.apply_chat_template([system, {"role": "user", "content": "?"}])
        if writer.unheard:
            raise UserError(
                f"{model}: its chat template has no place for a system instruction, {prompting.system!r}; "
                "leave it out"
            )
    return writer


def open_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory as transformers has it, with its chat templates.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds that a wrong name need not cost

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - a damaged file can raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{model}: its tokenizer or chat template cannot be read ({reason})") from None


def chosen_template(templates: str | dict[str, str] | None, name: str | None, model: Path) -> str:
    """One of a tokenizer's chat templates: that of a name, or the default one.

    Raises:
        UserError: there is none.
    """
    if not templates:
        raise UserError(
            f"{model}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "ask without one, or take a model that was fine-tuned on conversations"
        )
    named = {"default": templates} if isinstance(templates, str) else templates
    if (found := named.get("default" if name is None else name)) is None:
        wanted = "of several chat templates none is the default" if name is None else f"no template {name!r}"
        raise UserError(f"{model}: {wanted}; name one of {', '.join(sorted(named))}")
    return found


def tokens_beside(own: TextTokenizer, asked: Asked) -> int:
    """How many tokens of a prompt are not the question: what begins it, an instruction, turns around it."""
    system = asked.prompting.system or ""
    if asked.writer is not None:
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "?"}]
        system = asked.writer.apply_chat_template(messages)
    begun = system.startswith("".join(own.begin))
    return len(own.library(markup=True).encode(system, add_special_tokens=not begun).ids)
