"""Samples: windows of the text, conversations with the assistant's tokens, blends; the same at any layout."""

import json
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from support.training_runs import CHAT_TEMPLATE, CONFIG, TEXT, job_of

from bridge.huggingface.byte_tokenizer import byte_tokenizer_files
from bridge.model.process_groups import model_parallel
from bridge.training.data.batches import NAMES, build_dataset, microbatches
from bridge.training.data.documents import read_documents
from bridge.training.data.indexed import make_sources
from bridge.training.data.tokenizer import Tokenizer
from bridge.training.settings import TrainJob

FIRST_BYTE, END = 3, 2
VOCABULARY = CONFIG["vocab_size"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in byte_tokenizer_files(CHAT_TEMPLATE).items():
        (tmp_path / name).write_text(text)
    return tmp_path


def job(folder: Path, *data: Path, **changes) -> TrainJob:
    return job_of(folder, folder / "run", data=tuple(map(str, data)), **changes)


def samples(job: TrainJob, folder: Path) -> list[dict]:
    with model_parallel():
        sources = make_sources(job.data, Tokenizer(str(folder), VOCABULARY), VOCABULARY, folder / "cache")
        dataset = build_dataset(job, sources, folder / "cache")
        return [dataset[number] for number in range(job.steps * job.global_batch_size)]


def said(ids: torch.Tensor) -> bytes:
    return bytes(one - FIRST_BYTE for one in ids.tolist() if one >= FIRST_BYTE)


def test_samples_are_windows_of_the_text_each_once_an_epoch(folder: Path) -> None:
    text = TEXT.read_bytes()
    windows = [text[at : at + 32] for at in range(0, len(text) - 32, 32)]
    found = samples(job(folder, TEXT, steps=len(windows) // 4), folder)
    assert len(found) == len(windows) // 4 * 4
    assert {said(one["tokens"]) for one in found} <= set(windows)
    assert len({said(one["tokens"]) for one in found}) > 0.95 * len(found), "some few sentences recur in the text"
    assert all(torch.equal(one["tokens"][1:], one["labels"][:-1]) and one["loss_mask"].all() for one in found)
    assert [said(one["tokens"]) for one in found] != windows[: len(found)], "in an order of the seed"


def test_only_what_the_assistant_says_is_trained_on(folder: Path) -> None:
    lines = [
        [("system", "be brief"), ("user", "one?"), ("assistant", "first é"), ("user", "two?"), ("assistant", "second")],
        [("user", "three?"), ("assistant", "third")],
    ]
    text = [json.dumps({"messages": [{"role": r, "content": c} for r, c in line]}) for line in lines]
    (folder / "chat.jsonl").write_text("\n".join(text) + "\n")
    # Each document as (byte, whether it is trained on); a sample is a window of some documents one after another.
    documents = [
        [(byte, of == role == "assistant") for role, text in line for of, part in (("", f"<{role}>"), (role, text))
         for byte in part.encode()]
        for line in lines
    ]  # fmt: skip
    streams = [[pair for number in order for pair in documents[number]] for order in product((0, 1), repeat=6)]
    for one in samples(job(folder, folder / "chat.jsonl", steps=2, seq_length=40, warmup_steps=0), folder):
        pairs = [(label - FIRST_BYTE, bool(kept)) for label, kept in zip(one["labels"], one["loss_mask"], strict=True)]
        starts = range(len(streams[0]) - len(pairs))
        assert any(stream[at : at + len(pairs)] == pairs for stream in streams for at in starts), pairs


def test_a_turn_that_the_template_renders_otherwise_later_is_refused(folder: Path) -> None:
    """As templates do that drop the reasoning of earlier turns; weight 0 leaves it out."""
    drops = "{% for m in messages %}[{{ m['content'] if loop.last else m['content'][:2] }}]{% endfor %}"
    (folder / "chat_template.jinja").write_text(drops)
    tokenizer = Tokenizer(str(folder), VOCABULARY)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "thought"},
            {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}]  # fmt: skip
    with pytest.raises(ValueError, match="line 7: message 2: the chat template renders this turn in another way"):
        tokenizer.conversation(talk, "line 7")
    talk[1]["weight"] = 0
    ids, trained = tokenizer.conversation(talk, "line 7")
    assert said(torch.tensor([one for one, kept in zip(ids, trained, strict=True) if kept])) == b"[yes]"


# In short what MiniMax-M2's template does: a thought is asked for, and rendered of turns after the last user's alone;
# tools are said first, and a role that it does not know is left out.
THINKS = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "[system]{{ messages[0].content if messages[0].role == 'system' }}"
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %};{% for m in messages %}"
    "{% if m.role == 'assistant' %}[ai]"
    "{% if m.reasoning_content and loop.index0 > last.user %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content if m.content is string else m.content[0].text }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}){% endfor %};"
    "{% elif m.role == 'user' %}[user]{{ m.content }};{% elif m.role == 'tool' %}[tool]{{ m.content }};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[ai]<think>{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "why"}, {"role": "assistant", "content": "<so>"}
THOUGHT = ANSWER | {"reasoning_content": "hm"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
# Messages, and what of them is trained on.
TALKS: dict[str, tuple[list[dict], bytes]] = {
    "no thought": ([USER, ANSWER], b"<so>;"),
    "a thought": ([USER, THOUGHT], b"hm</think><so>;"),
    "several turns": ([USER, ANSWER, USER, ANSWER], b"<so>;<so>;"),
    "a thought at last": ([USER, ANSWER, USER, THOUGHT], b"<so>;hm</think><so>;"),
    "the assistant first": ([ANSWER, USER, ANSWER], b"<so>;<so>;"),
    "a first thought": ([THOUGHT], b"<think>hm</think><so>;"),
    "weights that are null": ([USER, ANSWER | {"weight": None}], b"<so>;"),
    "parts": ([USER, ANSWER | {"content": [{"type": "text", "text": "<so>"}]}], b"<so>;"),
    "a call": ([USER, CALL, {"role": "tool", "content": "1"}, THOUGHT], b"(f x=1);hm</think><so>;"),
}


@pytest.mark.parametrize("name", TALKS)
def test_turns_of_a_template_that_asks_for_a_thought(folder: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text(THINKS)
    messages, expected = TALKS[name]
    ids, trained = Tokenizer(str(folder), VOCABULARY).conversation(messages, "here")
    assert said(torch.tensor([one for one, kept in zip(ids, trained, strict=True) if kept])) == expected


def test_a_thought_that_the_template_drops_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(THINKS)
    with pytest.raises(ValueError, match=r"message 2: .*perhaps without its reasoning, .*a line of its own"):
        Tokenizer(str(folder), VOCABULARY).conversation([USER, THOUGHT, USER, ANSWER], "here")


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("{{ m.content }}", THOUGHT),
        ("{{ m.content.split('</think>')[-1] }}", ANSWER | {"content": "<think>hm</think>so"}),
    ],
    ids=["never", "of what is inline"],
)
def test_a_thought_that_the_template_never_renders_is_refused(folder: Path, template: str, answer: dict) -> None:
    asking = "{% if add_generation_prompt %}<think>{% endif %}"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}" + template + "{% endfor %}" + asking)
    with pytest.raises(ValueError, match=r"message 2: the chat template leaves out its reasoning"):
        Tokenizer(str(folder), VOCABULARY).conversation([USER, answer], "here")


def test_tools_are_said_by_the_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(THINKS)
    (folder / "a.jsonl").write_text(json.dumps({"messages": [USER, ANSWER], "tools": [{"function": {"name": "f"}}]}))
    (document,) = read_documents(folder / "a.jsonl", Tokenizer(str(folder), VOCABULARY), VOCABULARY)
    assert said(torch.from_numpy(document.tokens)) == b"[system]f;[user]why;[ai]<so>;"


BAD_TALKS: dict[str, tuple[object, str]] = {
    "weight": ([USER, ANSWER | {"weight": "0"}], r"message 2: weight must be 0 or 1, found '0'"),
    "role": ([USER, ANSWER | {"role": 5}], r"message 2: role must be a string, found 5"),
    "no content": ([USER, {"role": "assistant"}], r"message 2: content must be a string or .*, found NoneType"),
    "a number": ([{"role": "user", "content": 1}, ANSWER], r"message 1: content must be a string or .*, found int"),
    "unknown role": ([{"role": "owl", "content": "a"}, ANSWER], r"message 1: .*renders nothing of it, .*'owl'"),
    "a late system": ([USER, {"role": "system", "content": "b"}, ANSWER], r"message 2: .*nothing of it, .*'system'"),
    "calls that are none": ([USER, ANSWER | {"tool_calls": 5}], r"the chat template refuses these messages"),
    "arguments": (
        [USER, CALL | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
        r"the chat template refuses these messages \(.*\); arguments of a tool call must be an object, found a string",
    ),
    "half a character": ([USER, ANSWER | {"content": "\ud800"}], r"'\\ud800' is half of a character"),
}


@pytest.mark.parametrize("name", BAD_TALKS)
def test_messages_that_are_none(folder: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text(THINKS)
    messages, words = BAD_TALKS[name]
    with pytest.raises(ValueError, match=f"here: {words}"):
        Tokenizer(str(folder), VOCABULARY).conversation(messages, "here")


def test_a_template_that_marks_the_assistant_is_believed(folder: Path) -> None:
    marked = "<{% generation %}{{ m['content'] }}{% endgeneration %}>"
    turn = "{% if m['role'] == 'assistant' %}" + marked + "{% else %}{{ m['content'] }}{% endif %}"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}" + turn + "{% endfor %}")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    ids, trained = Tokenizer(str(folder), VOCABULARY).conversation(talk, "here")
    assert said(torch.tensor(ids)) == b"hi<yes>"
    assert said(torch.tensor([one for one, kept in zip(ids, trained, strict=True) if kept])) == b"yes"


def test_files_are_tokenised_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(str(folder), VOCABULARY)
    first = make_sources([str(TEXT)], tokenizer, VOCABULARY, folder / "cache")
    assert first[0].tokens == first[0].trained == len(TEXT.read_bytes()) + 1
    monkeypatch.setattr(Tokenizer, "text", None)
    assert make_sources([str(TEXT)], tokenizer, VOCABULARY, folder / "cache") == first


@pytest.mark.parametrize("suffix", [".json", ".bin", ".idx"])
def test_what_is_damaged_is_made_anew(folder: Path, suffix: str) -> None:
    tokenizer = Tokenizer(str(folder), VOCABULARY)
    (made,) = make_sources([str(TEXT)], tokenizer, VOCABULARY, folder / "cache")
    file = Path(made.prefix + suffix)
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(b""), lambda: file.write_bytes(whole[: len(whole) // 2]), file.unlink):
        damage()
        assert make_sources([str(TEXT)], tokenizer, VOCABULARY, folder / "cache") == [made]
        assert file.read_bytes() == whole


def test_of_data_that_is_refused_nothing_is_kept(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        make_sources([str(folder / "a.jsonl")], Tokenizer(str(folder), VOCABULARY), VOCABULARY, folder / "cache")
    assert list((folder / "cache").iterdir()) == []


def test_what_was_tokenised_is_found_where_the_run_is_now(folder: Path) -> None:
    text = folder / "a.txt"
    text.write_bytes(TEXT.read_bytes())
    tokenizer = Tokenizer(str(folder), VOCABULARY)
    (made,) = make_sources([str(text)], tokenizer, VOCABULARY, folder / "before")
    (folder / "before").rename(folder / "after")
    (found,) = make_sources([str(text)], tokenizer, VOCABULARY, folder / "after")
    assert found == made._replace(prefix=made.prefix.replace("before", "after"))
    assert Path(f"{found.prefix}.bin").is_file()


def test_the_same_bytes_of_another_kind_or_with_another_index_are_other_data(folder: Path) -> None:
    lines, text = folder / "a.jsonl", folder / "a.txt"
    for path in (lines, text):
        path.write_text('{"text": "one two three"}\n')
    tokenizer = Tokenizer(str(folder), VOCABULARY)
    as_lines, as_text = make_sources([str(lines), str(text)], tokenizer, VOCABULARY, folder / "cache")
    assert as_lines.fingerprint != as_text.fingerprint
    assert as_lines.tokens < as_text.tokens
    found = []
    for lengths in ([8], [3, 5]):
        builder = IndexedDatasetBuilder(str(folder / "b.bin"), dtype=np.int32)
        builder.add_document(np.arange(3, 11), lengths)
        builder.finalize(str(folder / "b.idx"))
        found += make_sources([str(folder / "b.bin")], None, VOCABULARY, folder / "cache")
    assert found[0].fingerprint != found[1].fingerprint
    assert found[0].prefix == found[1].prefix == str(folder / "b")


def test_blends_of_indexed_datasets_follow_their_weights(folder: Path) -> None:
    """Datasets that megatron-core's own builder wrote: one of tokens 10, one of tokens 20."""
    for token in (10, 20):
        builder = IndexedDatasetBuilder(str(folder / f"{token}.bin"), dtype=np.uint16)
        for _ in range(4):
            builder.add_document(np.full(100, token), [100])
        builder.finalize(str(folder / f"{token}.idx"))
    files = (folder / "10.bin", folder / "20.bin")
    found = samples(job(folder, *files, data_weights=(0.75, 0.25), steps=20), folder)
    drawn = Counter(one["tokens"][0].item() for one in found)
    assert drawn == {10: 60, 20: 20}
    even = samples(job(folder, *files, steps=20), folder)
    assert Counter(one["tokens"][0].item() for one in even) == {10: 40, 20: 40}


def test_data_parallel_ranks_share_the_samples_of_a_step() -> None:
    dataset = [{name: torch.tensor([number]) for name in NAMES} for number in range(24)]
    for dp, size in ((1, 1), (2, 1), (2, 2), (4, 1)):
        settings = job_of(Path("m"), Path("o"), global_batch_size=8, micro_batch_size=size)
        for step in (1, 3):
            ranks = [list(microbatches(dataset, settings, step, dp=dp, dp_rank=rank)) for rank in range(dp)]
            drawn = [n for rank in ranks for batch in rank for n in batch["tokens"].flatten().tolist()]
            assert sorted(drawn) == list(range(8 * (step - 1), 8 * step))
            assert all(len(rank) == 8 // (dp * size) for rank in ranks)
