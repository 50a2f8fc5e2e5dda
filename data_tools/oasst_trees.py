"""Read OpenAssistant files as message trees: nested ``*.trees.jsonl`` and flat message files, by their first line.

Owns: the published formats of trees, messages and labels, and their checks; linking flat messages by their parents.
Does not own: pruning and making conversations (``oasst.py``). Nested files are streamed; the messages of all flat files
are held in memory, since a parent may be anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.rows import Row
from steerlm_megatron.errors import UserError
from steerlm_megatron.steer.attributes import AttributeSchema, is_number
from steerlm_megatron.steer.lines import OnError, Rejected, reject
from steerlm_megatron.steer.messages import without_null_objects

_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}


@dataclass(slots=True, eq=False)
class Node:
    """A message of a tree."""

    id: str
    is_reply: bool  # an assistant message
    text: str
    lang: str
    deleted: bool
    attributes: dict[str, float] | None
    parent_id: str | None = None
    tree_id: str | None = None
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    answered: bool = False  # whether an assistant message is below it
    used: bool = False  # whether an earlier path has it
    done: bool = False  # whether an earlier path that was kept has it
    notes: tuple[str, ...] = ()  # names of counts that this message adds to


def read_trees(
    files: Iterable[Iterable[tuple[str, Row]]],
    schema: AttributeSchema,
    report: dict[str, Any],
    on_error: OnError,
    rejected: Rejected | None,
) -> Iterator[tuple[str, Node, int]]:
    """Yield ``(tree id, root, number of messages)`` of every tree, unpruned, from each file's ``("file:line", row)``.

    Orphans are counted here.
    """
    flat: dict[str, Node] = {}
    for rows in files:
        nested: bool | None = None
        for where, row in rows:
            try:
                row = without_null_objects(row, where)
                if nested is None:
                    nested = _is_nested(row, where)
                if nested:
                    tree_id, nodes = _nested_tree(row, where, schema)
                else:
                    node = _node(row, where, schema)
            except UserError as error:
                reject(error, on_error, rejected)
                continue
            report["lines"] += 1
            if nested:
                _count(nodes, report)
                yield tree_id, nodes[0], len(nodes)
            else:
                _count([node], report)
                if node.id in flat:
                    report["skipped"]["messages"]["repeated"] += 1
                else:
                    flat[node.id] = node
    yield from _flat_trees(flat, report)


def _count(nodes: list[Node], report: dict[str, Any]) -> None:
    report["messages"] += len(nodes)
    report["languages"].update([node.lang for node in nodes])
    report["notes"].update([note for node in nodes for note in node.notes])


def _is_nested(row: dict[str, Any], where: str) -> bool:
    """Return whether a file is nested, from its first line."""
    if isinstance(row.get("prompt"), dict):
        return True
    if "message_id" in row and "text" in row:
        return False
    raise UserError(
        f"{where}: neither an OpenAssistant tree ('prompt' with 'replies') nor a message ('message_id', 'parent_id', "
        f"'text', 'role'); its keys: {' '.join(row) or 'none'}; for chat records use data.source=messages"
    )


def _nested_tree(row: dict[str, Any], where: str, schema: AttributeSchema) -> tuple[str, list[Node]]:
    """Return the tree's id and all its messages, the root first. A message id that occurs twice is an error."""
    prompt = row.get("prompt")
    if not isinstance(prompt, dict):
        raise UserError(f"{where}: prompt must be an object with message_id, text, role and replies")
    root = _node(prompt, where, schema)
    nodes: dict[str, Node] = {root.id: root}
    stack = [(root, prompt)]
    while stack:
        parent, raw = stack.pop()
        replies = raw.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise UserError(f"{where}: replies of message {parent.id} must be a list of messages")
        for reply in replies:
            child = _node(reply, where, schema)
            if child.id in nodes:
                raise UserError(f"{where}: message_id {child.id} occurs twice in the tree")
            nodes[child.id] = child
            child.parent = parent
            parent.children.append(child)
            stack.append((child, reply))
    tree_id = row.get("message_tree_id")
    return tree_id if isinstance(tree_id, str) and tree_id else root.id, list(nodes.values())


def _flat_trees(flat: dict[str, Node], report: dict[str, Any]) -> Iterator[tuple[str, Node, int]]:
    """Link messages by their parents; yield the trees in the order of their roots."""
    roots: list[Node] = []
    orphans: list[Node] = []
    for node in flat.values():
        if node.parent_id is None:
            roots.append(node)
        elif node.parent_id in flat and node.parent_id != node.id:
            node.parent = flat[node.parent_id]
            node.parent.children.append(node)
        else:
            orphans.append(node)
    skipped = report["skipped"]["messages"]
    reached = 0
    for orphan in orphans:
        below = sum(1 for _ in preorder(orphan)) - 1
        skipped["orphan"] += 1
        skipped["below_skipped"] += below
        reached += 1 + below
    for root in roots:
        size = sum(1 for _ in preorder(root))
        reached += size
        yield root.tree_id or root.id, root, size
    if reached < len(flat):  # messages in a cycle of parents are below no root
        skipped["orphan"] += len(flat) - reached


def preorder(root: Node) -> Iterator[Node]:
    """Yield the message and all below it, parents first, siblings in file order."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def _node(raw: dict[str, Any], where: str, schema: AttributeSchema) -> Node:
    """Check a message and return it. A UserError names file, line and key."""
    name, text, role = raw.get("message_id"), raw.get("text"), raw.get("role")
    if raw.get("deleted"):  # it is pruned and counted, so its other keys are not checked
        text, role = "" if text is None else text, "prompter" if role is None else role
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: message_id={name!r} must be a string")
    if not isinstance(text, str):
        raise UserError(f"{where}: message {name}: text={text!r} must be a string")
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{where}: message {name}: role={role!r}; legal: {' '.join(_ROLES)}")
    parent_id, tree_id = raw.get("parent_id"), raw.get("message_tree_id")
    for key, value in (("parent_id", parent_id), ("message_tree_id", tree_id)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: message {name}: {key}={value!r} must be a string or null")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: message {name}: half a surrogate pair at character {error.start}") from error
    is_reply = role == "assistant"
    attributes, others = _labels(raw.get("labels"), f"{where}: message {name}", schema) if is_reply else (None, [])
    notes = [f"label_not_in_schema:{other}" for other in others]
    if raw.get("review_result") is False:
        notes.append("review_result_false")
    return Node(
        id=name,
        is_reply=is_reply,
        text=text,
        lang=str(raw.get("lang") or "unknown"),
        deleted=bool(raw.get("deleted")),
        attributes=attributes,
        parent_id=parent_id or None,
        tree_id=tree_id or None,
        notes=tuple(notes),
    )


def _labels(labels: Any, where: str, schema: AttributeSchema) -> tuple[dict[str, float] | None, list[str]]:
    """Convert labels in [0, 1] of any published format into values on the schema's scale, in its order (None if there
    are none), and return the names that the schema lacks.

    Formats: ``{"name": [..], "value": [..]}``, ``{"quality": {"value": .5}}``, ``{"quality": .5}``, ``[{"name":
    "quality", "value": .5}]``; null is absent.
    """
    if not labels:
        return None, []
    if isinstance(labels, Mapping) and isinstance(labels.get("name"), list):
        names, values = labels["name"], labels.get("value")
        if not isinstance(values, list) or len(values) != len(names) or not all(isinstance(n, str) for n in names):
            raise UserError(f"{where}: labels.name must be a list of names, and labels.value one as long of values")
        found: dict[Any, Any] = dict(zip(names, values, strict=True))
    elif isinstance(labels, list) and all(isinstance(m, Mapping) and isinstance(m.get("name"), str) for m in labels):
        found = {item["name"]: item for item in labels}
    elif isinstance(labels, Mapping):
        found = dict(labels)
    else:
        raise UserError(f"{where}: labels={str(labels)[:60]} must be a mapping of names to values in [0, 1]")
    kept: dict[str, float] = {}
    for name in schema.names:
        value = found.get(name)
        if isinstance(value, Mapping):
            value = value.get("value")
        if value is None:
            continue
        if not is_number(value) or not 0 <= value <= 1:
            raise UserError(f"{where}: label {name}={value!r} must be a number in [0, 1]")
        kept[name] = value * schema.max_level
    return kept or None, [str(name) for name in found if name not in schema.names]
