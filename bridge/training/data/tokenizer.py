"""The checkpoint's own tokenizer: text and conversations to token ids.

Of a conversation only what the assistant says is trained on. A template says where that is by `{% generation %}`; of
one that does not, turns are found by rendering the conversation up to each of them.
"""

import hashlib
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
         "merges.txt", "tokenizer.model")  # fmt: skip
_GENERATION = "{% generation"


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

    def text(self, text: str) -> list[int]:
        """The text's tokens and end-of-sequence."""
        return [
            *self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            self._tokenizer.eos_token_id,
        ]

    def conversation(self, messages: Any, where: str) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation by the chat template, and whether each is the assistant's.

        Raises:
            ValueError: these are no messages, there is no template, or it does not say where the turns are.
        """
        _check_messages(messages, where)
        template = self._tokenizer.chat_template
        if not template:
            raise ValueError(f"{where}: messages need a chat template, and the tokenizer has none; lay a "
                             "chat_template.jinja beside it")  # fmt: skip
        spans = None if _GENERATION in str(template) else self._turns(messages, where)
        if spans is None:
            if any(message.get("weight", 1) == 0 for message in messages):
                raise ValueError(
                    f"{where}: weight 0 does not go with a chat template that has {{% generation %}}: it says itself "
                    "what is trained on"
                )
            found = self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]
        found = self._tokenizer(self._render(messages, where), add_special_tokens=False, return_offsets_mapping=True)
        trained = [any(a <= start < b for a, b in spans) for start, _ in found["offset_mapping"]]
        return list(found["input_ids"]), trained

    def _turns(self, messages: list[dict[str, Any]], where: str) -> list[tuple[int, int]]:
        """Where in the rendered conversation the assistant speaks, in characters."""
        whole, spans = self._render(messages, where), []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            before = self._render(messages[:index], where, add_generation_prompt=True) if index else ""
            upto = self._render(messages[: index + 1], where)
            if not (whole.startswith(upto) and upto.startswith(before)):
                raise ValueError(
                    f"{where}: message {index + 1}: the chat template renders this turn in another way once others "
                    'follow, so what the assistant said is not to be found; give it "weight": 0, or a template with '
                    "{% generation %}"
                )
            spans.append((len(before), len(upto)))
        return spans

    def _render(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{where}: the chat template refuses these messages ({error})") from error


def _check_messages(messages: Any, where: str) -> None:
    whole = isinstance(messages, list) and all(isinstance(one, dict) and "role" in one for one in messages)
    if not whole or not messages:
        raise ValueError(f"{where}: messages must be a list of objects with a role and a content")
    if not any(one["role"] == "assistant" and one.get("weight", 1) != 0 for one in messages):
        raise ValueError(f"{where}: no message is the assistant's, so nothing in it is trained on; leave the line out")


def _fingerprint(folder: Path, tokenizer: Any) -> str:
    """Of what decides the tokens: the files, or, of one from the hub, its vocabulary and template."""
    digest = hashlib.sha256()
    found = [folder / name for name in FILES if (folder / name).is_file()]
    for path in found:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    if not found:
        digest.update(repr((sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)).encode())
    return digest.hexdigest()
