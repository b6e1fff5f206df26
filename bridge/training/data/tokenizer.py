"""The checkpoint's own tokenizer: text and conversations to token ids.

Of a conversation only what the assistant says is trained on. A template says where that is by `{% generation %}`; of
one that does not, turns are found by rendering the conversation up to each of them.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
         "merges.txt", "tokenizer.model")  # fmt: skip
_GENERATION = "{% generation"
END_OF_THOUGHT = "</think>"


class Tokenizer:
    """A tokenizer of `transformers`, from a folder or hub id; `vocab_size` is the model's.

    Raises:
        ValueError: `transformers` is not there, no tokenizer is, it has no end-of-sequence token, or more tokens than
            the model.
    """

    def __init__(self, source: str, vocab_size: int):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                "text is tokenised by transformers, which is not installed; pip install -e '.[train]' brings it, or "
                "give token ids"
            ) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # it raises whatever the files make its many classes raise
            said = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{source}: no tokenizer can be made of this ({type(error).__name__}: {said}); lay the model's "
                "tokenizer.json and tokenizer_config.json there, name another --tokenizer, or give token ids"
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"{source}: the tokenizer has no eos_token, which ends each document; set it there")
        if len(self._tokenizer) > vocab_size:
            raise ValueError(
                f"{source}: the tokenizer has {len(self._tokenizer)} tokens, the model {vocab_size}; it is another "
                "model's tokenizer"
            )
        self.fingerprint = _fingerprint(Path(source), self._tokenizer)

    def text(self, text: str, where: str) -> list[int]:
        """The text's tokens and end-of-sequence."""
        _check_characters(text, where)
        return [
            *self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            self._tokenizer.eos_token_id,
        ]

    def conversation(self, messages: Any, where: str, tools: Any = None) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation by the chat template, with `tools` if it says them; whether each is the assistant's.

        Raises:
            ValueError: these are no messages or tools, there is no template, or it does not say where the turns are.
        """
        _check_messages(messages, where)
        if tools is not None and not (isinstance(tools, list) and all(isinstance(one, dict) for one in tools)):
            raise ValueError(f"{where}: tools must be a list of objects, found {type(tools).__name__}")
        template = self._tokenizer.chat_template
        if not template:
            raise ValueError(f"{where}: messages need a chat template, and the tokenizer has none; lay a "
                             "chat_template.jinja beside it")  # fmt: skip
        messages = [{**one, "content": ""} if one.get("content") is None else one for one in messages]
        render = partial(self._render, where=where, tools=tools)
        whole = render(messages)
        _check_characters(whole, where)
        _check_roles(messages, render, where)
        spans = None if _GENERATION in str(template) else _turns(messages, whole, render, where)
        if spans is None:
            if not all(map(_is_trained, messages)):
                raise ValueError(
                    f"{where}: weight 0 does not go with a chat template that has {{% generation %}}: it says itself "
                    "what is trained on"
                )
            found = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]
        found = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        trained = [any(a <= start < b for a, b in spans) for start, _ in found["offset_mapping"]]
        return list(found["input_ids"]), trained

    def _render(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template raises what it likes
            hint = (
                "; arguments of a tool call must be an object, found a string" if _has_text_arguments(messages) else ""
            )
            raise ValueError(f"{where}: the chat template refuses these messages ({error}){hint}") from error


Render = Callable[..., str]  # of messages, and of a generation prompt after them


def _turns(messages: list[dict[str, Any]], whole: str, render: Render, where: str) -> list[tuple[int, int]]:
    """Where in the rendered conversation, `whole`, the assistant speaks, in characters.

    A turn begins where the model would be asked for it, after the messages before. A template may ask with the
    beginning of a thought, of which a turn without one has nothing; that one, and a first message, begins where it
    would with any content.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not _is_trained(message):
            continue
        before, upto = messages[:index], render(messages[: index + 1])
        asked = render(before, add_generation_prompt=True) if before else None
        plain = {name: value for name, value in message.items() if name != "reasoning_content"}
        if asked is None or not upto.startswith(asked):
            one, other = (render([*before, _saying(plain, letter)]) for letter in "ab")
            asked = one[: sum(takewhile(bool, map(eq, one, other)))]
        thought = message.get("reasoning_content") and render([*before, plain]) == upto
        if thought or (END_OF_THOUGHT in str(message["content"]) and END_OF_THOUGHT not in upto[len(asked) :]):
            raise ValueError(
                f"{where}: message {index + 1}: the chat template leaves out its reasoning, which would not be trained "
                "on; take it out of the message, or give a template that has it"
            )
        if not (whole.startswith(upto) and upto.startswith(asked)):
            raise ValueError(
                f"{where}: message {index + 1}: the chat template renders this turn in another way once others follow, "
                'perhaps without its reasoning, so that what was said is not there to be trained on; give it "weight": '
                "0, and a line of its own that ends with it"
            )
        spans.append((len(asked), len(upto)))
    return spans


def _check_messages(messages: Any, where: str) -> None:
    whole = isinstance(messages, list) and all(isinstance(one, dict) and "role" in one for one in messages)
    if not whole or not messages:
        raise ValueError(f"{where}: messages must be a list of objects with a role and a content")
    for number, one in enumerate(messages, 1):
        content, instead = one.get("content"), any(one.get(name) for name in ("tool_calls", "reasoning_content"))
        if not isinstance(one["role"], str):
            raise ValueError(f"{where}: message {number}: role must be a string, found {one['role']!r}")
        if not isinstance(content, str | list) and not (content is None and instead):
            raise ValueError(
                f"{where}: message {number}: content must be a string or a list of parts, found "
                f"{type(content).__name__}; leave the message out, or give it one"
            )
        if one.get("weight") not in (None, 0, 1):
            raise ValueError(f"{where}: message {number}: weight must be 0 or 1, found {one['weight']!r}")
    if not any(one["role"] == "assistant" and _is_trained(one) for one in messages):
        raise ValueError(f"{where}: no message is the assistant's, so nothing in it is trained on; leave the line out")


def _is_trained(message: dict[str, Any]) -> bool:
    return message.get("weight") is None or message["weight"] != 0


def _saying(message: dict[str, Any], text: str) -> dict[str, Any]:
    """The same with another content, of the same kind."""
    content = [{"type": "text", "text": text}] if isinstance(message["content"], list) else text
    return {**message, "content": content}


def _check_roles(messages: list[dict[str, Any]], render: Render, where: str) -> None:
    """A template may render nothing of a message: of a role that it does not know, of a system's that is not first.

    Looked at is the first of each such.
    """
    seen: set[tuple[str, bool]] = set()
    for index, message in enumerate(messages):
        kind = message["role"], index == 0
        if message["role"] in ("user", "assistant") or kind in seen:
            continue
        seen.add(kind)
        one, other = (render([*messages[:index], _saying(message, text), *messages[index + 1 :]]) for text in "ab")
        if one == other:
            raise ValueError(
                f"{where}: message {index + 1}: the chat template renders nothing of it, whose role is "
                f"{message['role']!r}; leave it out, or give a template that has it"
            )


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {text[error.start]!r} is half of a character; write both halves of it, or leave it out"
        ) from error


def _has_text_arguments(messages: list[dict[str, Any]]) -> bool:
    calls = [one["tool_calls"] for one in messages if isinstance(one.get("tool_calls"), list)]
    functions = [call.get("function", call) for some in calls for call in some if isinstance(call, dict)]
    return any(isinstance(one, dict) and isinstance(one.get("arguments"), str) for one in functions)


def _fingerprint(folder: Path, tokenizer: Any) -> str:
    """Of what decides the tokens: the files, or, of one from the hub, its vocabulary and template."""
    digest = hashlib.sha256()
    found = [folder / name for name in FILES if (folder / name).is_file()]
    for path in found:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    if not found:
        digest.update(repr((sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)).encode())
    return digest.hexdigest()
