"""Megatron-Core reads our shards, views keep their promises, damage is named, and cuts follow the policy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from steerlm_megatron.data.feed.dataset import ShardDataset
from steerlm_megatron.data.label_tokens import LabelTokens
from steerlm_megatron.data.shards import MANIFEST, ShardReader, ShardWriter, write_index
from steerlm_megatron.data.views import PREDICTION, VIEWS, Document, build_documents, make_sample
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema
from steerlm_megatron.steer.records import Conversation, Message
from steerlm_megatron.steer.templates import Template
from tests.helpers import corpora

CONVERSATIONS = corpora.conversations(60, seed=3)


def write(
    folder: Path,
    template: Template = corpora.STEERLM,
    schema: AttributeSchema | None = corpora.SCHEMA,
    name: str = "trained",
    conversations: list[Conversation] = CONVERSATIONS,
    shard_tokens: int = 1500,
) -> list[Document]:
    tok = corpora.tokenizer(name, template.control_strings)
    documents = build_documents(conversations, tok, template, schema)
    with ShardWriter(folder, tok, schema, template, shard_tokens) as writer:
        for document in documents:
            writer.add(document)
        writer.commit({"in": len(documents), "out": len(documents), "skipped": {}}, [])
    return documents


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "train"
    write(folder)
    return folder


@pytest.mark.parametrize("name", ["trained", "user_defined", "mistral"])
@pytest.mark.parametrize("template_name", corpora.TEMPLATES)
def test_what_is_written_is_read(tmp_path, template_name: str, name: str) -> None:
    template = corpora.TEMPLATES[template_name]
    documents = write(tmp_path / "s", template, name=name)
    reader = ShardReader(tmp_path / "s", verify=True)
    assert len(reader) == len(documents) and len(reader.shards) > 1
    assert reader.schema == corpora.SCHEMA and reader.template == template
    assert reader.tokenizer.hash == reader.manifest["tokenizer"]["hash"]
    for index, document in enumerate(documents):
        stored = reader.document(index)
        assert stored.id == document.id and stored.header == document.header
        for field in ("tokens_T", "turns_N", "spans", "values_NA"):
            np.testing.assert_array_equal(getattr(stored, field), getattr(document, field))
    with pytest.raises(IndexError):
        reader.document(len(documents))


@pytest.mark.parametrize("name", ["trained", "mistral"])
def test_megatron_core_opens_every_shard(tmp_path, name: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder = tmp_path / "s"
    documents = write(folder, name=name)
    tokens = []
    for path in sorted(folder.glob("*.idx")):
        theirs = IndexedDataset(str(path.with_suffix("")))
        tokens += [
            theirs[index].copy() for index in range(len(theirs))
        ]  # copies, since the arrays die with the reader's memory map
        del theirs
    assert len(tokens) == len(documents)
    for sequence, document in zip(tokens, documents, strict=True):
        assert sequence.dtype == np.uint16
        np.testing.assert_array_equal(sequence, document.tokens_T)


def test_same_documents_same_bytes_and_replacement(tmp_path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", conversations=CONVERSATIONS[:3])
    write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_failed_write_leaves_nothing(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        with ShardWriter(tmp_path / "s", corpora.tokenizer("trained"), None, corpora.STEERLM, 10) as writer:
            for document in build_documents(CONVERSATIONS[:3], corpora.tokenizer("trained"), corpora.STEERLM, None):
                writer.add(document)
            raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_not_replaced(tmp_path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a shard folder"):
        write(tmp_path / "s")
    assert (tmp_path / "s" / "thesis.tex").read_text() == "precious"


# Damage


def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.mark.parametrize("suffix", ["idx", "bin", "turns.npy", "values.npy"])
def test_torn_files_are_named(shards: Path, tmp_path, suffix: str) -> None:
    path = copy(shards, tmp_path) / f"shard-00001.{suffix}"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    source = "its header" if suffix == "idx" else r"manifest\.json"
    wanted = rf"shard-00001\.{suffix} is truncated: it ends at byte {size - 1}, by {source} at {size}"
    with pytest.raises(UserError, match=wanted):
        ShardDataset.open(path.parent)
    path.unlink()
    with pytest.raises(UserError, match=rf"shard-00001\.{suffix} cannot be read"):
        ShardDataset.open(path.parent)


def test_a_foreign_index_is_named(shards: Path, tmp_path) -> None:
    path = copy(shards, tmp_path) / "shard-00000.idx"
    data = path.read_bytes()
    for byte in (0, 5, 9, 17):  # bytes of the magic, the version and the token type
        path.write_bytes(data[:byte] + b"x" + data[byte + 1 :])
        with pytest.raises(UserError, match=rf"shard-00000\.idx is not a Megatron-Core index.*: byte {byte} is 0x78"):
            ShardDataset.open(path.parent)
    path.write_bytes(data[:18] + bytes([data[18] ^ 1]) + data[19:])  # changes the number of sequences
    with pytest.raises(UserError, match=rf"shard-00000\.idx is t.*: it ends at byte {len(data)}, by its header at \d+"):
        ShardDataset.open(path.parent)
    path.write_bytes(b"TNTIDX\x00\x00" + data)  # fairseq's magic, and another size
    with pytest.raises(UserError, match=r"shard-00000\.idx is not a Megatron-Core index.*: byte 0 is 0x54"):
        ShardDataset.open(path.parent)
    write_index(path, np.array([3, 4], np.int32), np.dtype("<u2"))
    with pytest.raises(UserError, match=r"shard-00000\.idx is of another corpus: 2 documents, manifest\.json has \d+"):
        ShardDataset.open(path.parent)


def test_a_flipped_bit_is_found_on_request(shards: Path, tmp_path) -> None:
    path = copy(shards, tmp_path) / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    ShardDataset.open(path.parent)
    with pytest.raises(UserError, match=r"shard-00000\.bin is damaged"):
        ShardDataset.open(path.parent, verify=True)


def test_not_a_shard_folder(shards: Path, tmp_path) -> None:
    with pytest.raises(UserError, match="no such shard folder"):
        ShardDataset.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"not a shard folder.*did you mean .*train"):
        ShardDataset.open(shards.parent)
    (tmp_path / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(UserError, match="format=99"):
        ShardDataset.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 2, "files": {}, "shards": []}')
    with pytest.raises(UserError, match=r"manifest\.json is damaged: it lacks schema template tokenizer counts"):
        ShardDataset.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        ShardDataset.open(tmp_path)


# Views


def rendered(conversation: Conversation, template: Template, schema: AttributeSchema | None) -> tuple[list, list]:
    tok = corpora.tokenizer("trained", template.control_strings)
    segments = template.render(conversation, schema)
    ids, lengths = tok.encode_segments(segments)
    mask = [segment.trained for segment, length in zip(segments, lengths, strict=True) for _ in range(length)]
    return ids, mask


@pytest.mark.parametrize("template_name", corpora.TEMPLATES)
def test_acsft_and_sft_are_the_rendered_text(tmp_path, template_name: str) -> None:
    template = corpora.TEMPLATES[template_name]
    write(tmp_path / "s", template)
    dataset = ShardDataset.open(tmp_path / "s")
    for index, conversation in enumerate(CONVERSATIONS):
        for view, schema in (("acsft", corpora.SCHEMA), ("sft", None)):
            ids, mask = rendered(conversation, template, schema)
            sample = dataset.sample(index, view)
            if not any(mask):
                assert sample is None
                continue
            assert sample.tokens_T.tolist() == ids and sample.loss_mask_T.tolist() == mask
            assert len(sample.pool_P) == 0 and sample.values_PA.shape == (0, 3)
        ids, _ = rendered(conversation, template, None)
        sample = dataset.sample(index, "lm")
        assert sample.tokens_T.tolist() == ids
        assert sample.loss_mask_T.tolist() == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("template_name", ["steerlm", "llama2"])
def test_ap_markers_follow_what_was_scored(tmp_path, template_name: str) -> None:
    template = corpora.TEMPLATES[template_name]
    documents = write(tmp_path / "s", template)
    tok = corpora.tokenizer("trained", template.control_strings)
    marker = tok.control_id(template.label_marker)
    dataset = ShardDataset.open(tmp_path / "s")
    for index, conversation in enumerate(CONVERSATIONS):
        spoken = [message for message in conversation.messages if message.role != "system"]
        scored = [
            number for number, m in enumerate(spoken) if m.role == "assistant" and m.weight and m.attributes is not None
        ]
        sample = dataset.sample(index, "ap")
        if not scored:
            assert sample is None
            continue
        # Every assistant turn up to the last that counts gets a marker, and those that do not count get no target, so
        # that a turn has the same context in training and in annotation.
        marked = [number for number, m in enumerate(spoken) if m.role == "assistant" and number <= scored[-1]]
        assert len(sample.pool_P) == len(marked) and not sample.loss_mask_T.any()
        assert (sample.tokens_T[sample.pool_P] == marker).all()
        assert sample.pool_P[-1] == len(sample.tokens_T) - 1
        wanted = np.array(
            [corpora.SCHEMA.vector(spoken[number].attributes if number in scored else None) for number in marked],
            np.float32,
        )
        np.testing.assert_array_equal(sample.values_PA, wanted)
        without = np.delete(sample.tokens_T, sample.pool_P)
        ids, _ = rendered(conversation, template, None)
        assert without.tolist() == ids[: len(without)]
        everything = make_sample(documents[index], "ap", marker_id=marker, scored="all")
        assistant = [number for number, message in enumerate(spoken) if message.role == "assistant"]
        for found, numbers in ((sample, marked), (everything, assistant)):
            for position, number in zip(found.pool_P, numbers, strict=True):
                before = tok.decode(found.tokens_T[:position])
                assert before.endswith(spoken[number].content + template.response_suffix)


def test_lengths_are_those_of_the_samples(shards: Path) -> None:
    dataset = ShardDataset.open(shards)
    for view in VIEWS:
        lengths = dataset.lengths(view)
        samples = [dataset.sample(index, view) for index in range(len(dataset))]
        assert lengths.tolist() == [0 if sample is None else len(sample.tokens_T) for sample in samples]


def test_without_attributes(tmp_path) -> None:
    write(tmp_path / "s", schema=None)
    dataset = ShardDataset.open(tmp_path / "s")
    assert dataset.schema is None and dataset.label_mean().shape == (0,)
    for index in range(len(dataset)):
        plain, stored = dataset.sample(index, "sft"), dataset.sample(index, "acsft")
        assert (plain is None) == (stored is None)
        assert plain is None or plain.tokens_T.tolist() == stored.tokens_T.tolist()
    with pytest.raises(UserError, match="all tokens are masked"):
        dataset.plan("ap", 256, 0)


def test_label_mean(shards: Path) -> None:
    values = [
        corpora.SCHEMA.vector(message.attributes)
        for conversation in CONVERSATIONS
        for message in conversation.messages
        if message.attributes and message.weight
    ]
    np.testing.assert_allclose(ShardDataset.open(shards).label_mean(), np.nanmean(np.array(values), 0), rtol=1e-5)


# Plans and over-long samples


@pytest.mark.parametrize("view", VIEWS)
def test_plan_holds_every_sample_once_and_is_cached(shards: Path, tmp_path, view: str) -> None:
    dataset = ShardDataset.open(copy(shards, tmp_path))
    plan = dataset.plan(view, 100, 5)
    stored = dataset.plan(view, 100, 5)
    assert len(list((dataset.folder / "plans").iterdir())) == 1
    assert stored.report() == plan.report() and (stored.samples == plan.samples).all()
    assert len(set(plan.samples.tolist())) == len(plan.samples)
    assert len(plan.samples) + plan.overlong_dropped + plan.masked_dropped == len(dataset) == plan.total
    total = 0
    for row in range(len(plan)):
        sizes = [len(dataset.sample(index, view, 100).tokens_T) for index in plan.row(row)]
        assert 0 < sum(sizes) <= 100
        total += sum(sizes)
    assert total == plan.useful_tokens


def test_plan_errors(shards: Path) -> None:
    dataset = ShardDataset.open(shards)
    with pytest.raises(UserError, match=r"data\.overlong='cut'"):
        dataset.plan("sft", 100, 0, overlong="cut", cache=False)
    with pytest.raises(UserError, match=r"sample 'c\d+' has \d+ tokens, more than train\.row_tokens=40"):
        dataset.plan("sft", 40, 0, overlong="error", cache=False)
    with pytest.raises(UserError, match="all tokens are masked"):
        dataset.plan("sft", 3, 0, overlong="drop", cache=False)
    plan = dataset.plan("sft", 60, 0, overlong="drop", cache=False)
    assert plan.overlong_dropped == (dataset.lengths("sft") > 60).sum() and plan.truncated == 0


def three_turns(template: Template, weights: tuple[int, int, int] = (1, 1, 1), long: str = "") -> Document:
    messages = []
    for number, weight in enumerate(weights):
        messages += [
            Message("user", f"question {number}" + (long if number == 2 else "")),
            Message("assistant", f"answer {number}", {"quality": number}, weight),
        ]
    conversation = Conversation("three", tuple(messages))
    tok = corpora.tokenizer("trained", template.control_strings)
    return build_documents([conversation], tok, template, corpora.SCHEMA)[0]


@pytest.mark.parametrize("template_name", corpora.TEMPLATES)
@pytest.mark.parametrize("view", VIEWS)
def test_left_turns_go_first(template_name: str, view: str) -> None:
    template = corpora.TEMPLATES[template_name]
    tok = corpora.tokenizer("trained", template.control_strings)
    marker = tok.control_id(template.label_marker)
    labels = LabelTokens.of(corpora.SCHEMA, tok, template.label_marker)
    document = three_turns(template)
    full = make_sample(document, view, marker_id=marker, labels=labels)
    sizes = set()
    for limit in range(len(full.tokens_T), 0, -1):
        sample = make_sample(document, view, limit, marker_id=marker, labels=labels)
        if sample is None:
            break
        assert len(sample.tokens_T) <= limit
        assert sample.cut_tokens == len(full.tokens_T) - len(sample.tokens_T)
        text = tok.decode(sample.tokens_T)
        if "question 2" in text and text.count("answer") < 3 and "answer 2" in text:
            kept = [int(number) for number in re.findall(r"question (\d)", text)]
            assert kept in ([1, 2], [2]), text
            sizes.add(len(kept))
            assert ("You are kind." in text) == (template_name != "llama2_bare")
            if view in ("sft", "lm", "acsft") and template_name == "steerlm":
                head = text[: text.index("<extra_id_1>")]
                assert text.startswith(head + f"<extra_id_1>User\nquestion {kept[0]}\n")
                assert (
                    sample.loss_mask_T[len(tok.encode_segments(template.render(Conversation("", ()), None)[:3])[0])]
                    == 0
                )
        if view == "ap":
            assert (sample.tokens_T[sample.pool_P] == marker).all()
            assert sample.pool_P[-1] == len(sample.tokens_T) - 1
            assert sample.values_PA[-1, 0] == 2, "the label of the last turn alone"
    assert sizes == {1, 2}


def test_cut_sample_is_the_shorter_conversation_rendered() -> None:
    tok = corpora.tokenizer("trained")
    document = three_turns(corpora.STEERLM)
    short = Conversation("x", tuple(m for n in (1, 2) for m in (
        Message("user", f"question {n}"), Message("assistant", f"answer {n}", {"quality": n})
    )))  # fmt: skip
    for view, schema in (("acsft", corpora.SCHEMA), ("sft", None)):
        ids, mask = rendered(short, corpora.STEERLM, schema)
        sample = make_sample(document, view, len(ids), marker_id=tok.control_id("<extra_id_2>"))
        assert sample.tokens_T.tolist() == ids and sample.loss_mask_T.tolist() == mask


def test_context_after_the_last_target_goes_first() -> None:
    document = three_turns(corpora.STEERLM, weights=(1, 1, 0))
    tok = corpora.tokenizer("trained")
    full = make_sample(document, "sft")
    sample = make_sample(document, "sft", len(full.tokens_T) - 1)
    text = tok.decode(sample.tokens_T)
    assert "question 0" in text and text.endswith("answer 1\n<extra_id_1>")
    assert sample.loss_mask_T.sum() == full.loss_mask_T.sum()


def test_a_long_prompt_loses_its_beginning_and_the_response_stays() -> None:
    tok = corpora.tokenizer("trained")
    document = three_turns(corpora.STEERLM, long=" river stone" * 200 + " the end?")
    for view in ("acsft", "sft", "ap"):
        sample = make_sample(document, view, 200, marker_id=tok.control_id("<extra_id_2>"))
        text = tok.decode(sample.tokens_T)
        assert len(sample.tokens_T) == 200 and " the end?\n<extra_id_1>Assistant\n" in text and "answer 2" in text
        assert text.startswith("<extra_id_0>System\nYou are kind.\n\n<extra_id_1>User\n") and "question" not in text


def test_a_long_response_loses_its_end() -> None:
    tok = corpora.tokenizer("trained")
    conversation = Conversation(
        "x", (Message("user", "question"), Message("assistant", "river stone " * 300, {"quality": 1}))
    )
    document = build_documents([conversation], tok, corpora.STEERLM, corpora.SCHEMA)[0]
    sample = make_sample(document, "acsft", 200)
    assert len(sample.tokens_T) == 200 and sample.loss_mask_T[-1]
    assert "question\n<extra_id_1>Assistant\n<extra_id_2>quality:1\nriver stone" in tok.decode(sample.tokens_T)
    assert tok.control_id("<extra_id_1>") != sample.tokens_T[-1]
    scored = make_sample(document, "ap", 200, marker_id=tok.control_id("<extra_id_2>"))
    assert len(scored.tokens_T) == 200 and tok.decode(scored.tokens_T).endswith("\n<extra_id_2>")


def test_truncate_response_keeps_the_beginning() -> None:
    tok = corpora.tokenizer("trained")
    marker = tok.control_id("<extra_id_2>")
    labels = LabelTokens.of(corpora.SCHEMA, tok, "<extra_id_2>")
    ends = {"ap": marker, "ap_text": labels.end[-1]}
    document = three_turns(corpora.STEERLM)
    for view in VIEWS:
        full = make_sample(document, view, marker_id=marker, labels=labels)
        for limit in range(1, len(full.tokens_T)):
            sample = make_sample(document, view, limit, "truncate_response", marker, labels=labels)
            if sample is None:
                continue
            size = len(sample.tokens_T)
            assert size == limit or (view in PREDICTION and size < limit and sample.tokens_T[-1] == ends[view])
            assert sample.tokens_T.tolist() == full.tokens_T[:size].tolist()
            assert sample.loss_mask_T.tolist() == full.loss_mask_T[:size].tolist()
