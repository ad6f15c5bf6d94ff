"""What a rule is, how it is registered, and what it may say about an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from graphprune.ops.labels import Dim, Ids, LabelTable
from graphprune.torch_private import argument_names, name_of

if TYPE_CHECKING:
    from graphprune.torch_private import OpOverload

Path: TypeAlias = tuple[str | int, ...]
Labels: TypeAlias = "list[Any]"  # one Dim per dimension; rules return these, or a list of them where there are several outputs
Rule: TypeAlias = "Callable[[Op], Labels | list[Labels]]"

RULES: dict[str, Rule] = {}


class _Names:
    """Spells operator names: `aten.conv2d` is "aten::conv2d", whether or not this version of PyTorch has it."""

    def __getattr__(self, name: str) -> str:
        return f"aten::{name}"


aten = _Names()


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of all overloads of the named operators.

    ATen operators are written `aten.conv2d`, others as a string, "torchvision::roi_align".

    Raises:
        ValueError: an operator has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                message = f"{name} has a rule already: {RULES[name].__module__}.{RULES[name].__name__}"
                raise ValueError(message)
            RULES[name] = function
        return function

    return register


def rule_for(target: OpOverload) -> Rule | None:
    """Returns the rule of an operator: its own, that of its out-of-place form, the elementwise rule, or None."""
    name = name_of(target)
    found = RULES.get(name)
    if found is None and torch.Tag.pointwise in target.tags:
        return RULES["pointwise"]
    if found is None and name.endswith("_"):
        return RULES.get(name[:-1]) or (RULES["pointwise"] if _is_pointwise(name[:-1]) else None)
    return found


def _is_pointwise(name: str) -> bool:
    """Returns whether an operator is tagged as pointwise (some in-place forms lack the tag that their out-of-place form has)."""
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def named_arguments(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by schema name, without those that were left to their defaults."""
    return dict(zip(argument_names(target), args, strict=False)) | dict(kwargs)


class _Unbound:
    """Marks a dimension of a parameter that has met nothing yet; it takes the first labels that it meets."""

    def __repr__(self) -> str:
        return "UNBOUND"


UNBOUND = _Unbound()


@dataclass(eq=False)
class Value:
    """A tensor of the program: its shape and one label array (or None, or UNBOUND) per dimension.

    Attributes:
        shape: sizes while recording.
        labels: per dimension.
        name: parameter name, or node name.
        constant: whether it depends on no parameter's channels and no input (a literal tensor).
        tensor: the tensor itself for parameters and constants.
        parameter: whether it is a parameter, or a buffer that shrinks with one.
        zero: whether a removed channel is zero here in the masked network.
        boolean: whether its elements are truth values.
        piece: what it was taken out of, where it is one position of a dimension.
        whole_of: what it is a slice of, where that slice leaves nothing out: the same tensor.
    """

    shape: tuple[int, ...]
    labels: list[Any]
    name: str
    constant: bool = False
    tensor: torch.Tensor | None = None
    parameter: bool = False
    zero: bool = False
    boolean: bool = False
    piece: Piece | None = None
    whole_of: Value | None = None


@dataclass(frozen=True, eq=False)
class Piece:
    """One position of a dimension, taken out by its number. It stays, unless all that becomes of it is that it is put back into its place.

    Attributes:
        source: the tensor that it is a position of.
        dim: the dimension.
        position: the position.
        needs: labels of that dimension that must stay for the number to remain right.
        reason: number of the reason why they do.
    """

    source: Value
    dim: int
    position: int
    needs: Ids
    reason: int


@dataclass(frozen=True)
class Why:
    """Why labels were frozen.

    Attributes:
        text: the reason as a phrase.
        operator: operator name.
        module: module path.
        remedy: what may be done about it.
    """

    text: str
    operator: str
    module: str
    remedy: str = ""


@dataclass(eq=False)
class Notes:
    """What a rule found out about one node.

    Attributes:
        extents: argument path -> labels whose surviving number that integer argument states.
        remaps: argument path of an index tensor -> labels of the dimension that it indexes.
        tables: argument path of such a tensor -> its own labels, per dimension, where it has not just one dimension.
        crops: argument path -> labels whose surviving number that integer argument states with a minus sign.
        constants: argument name -> value to pass explicitly once any of the labels given with it has lost an index.
        statistics: labels across which the operator takes a statistic.
        kept_only: labels that the operator cannot be given as zeros (it would divide by their norm); removal is exact all the same.
        produces: (parameter name, dim) pairs whose rows compute this node's channels.
        scales: names of parameters that scale channels after a norm of each channel's own.
        derived: (node name, dim) pairs likewise, of weights that are themselves computed from parameters.
        become: the operator and arguments to use instead once any extent or remap changes.
    """

    extents: dict[Path, Ids] = field(default_factory=dict)
    remaps: dict[Path, Ids] = field(default_factory=dict)
    tables: dict[Path, Labels] = field(default_factory=dict)
    crops: dict[Path, Ids] = field(default_factory=dict)
    constants: dict[str, tuple[Any, Ids]] = field(default_factory=dict)
    statistics: list[Ids] = field(default_factory=list)
    kept_only: list[Ids] = field(default_factory=list)
    produces: list[tuple[str, int]] = field(default_factory=list)
    derived: list[tuple[str, int]] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    become: tuple[Any, dict[str, Any]] | None = None


@dataclass(eq=False)
class Op:
    """One operator call, as its rule sees it: named arguments, shapes, labels, and verbs to couple, freeze and annotate.

    Attributes:
        name: operator name, e.g. ``aten::conv2d``.
        module: module path at which it ran.
        arguments: argument name -> value; tensors are :class:`Value`, lists stay lists.
        outputs: shape per output tensor.
        table: the label algebra.
        notes: what the rule says beside labels.
        open: dimensions of the output along which it may be stated how often one value is repeated.
        pieces: what each output is a piece of, where they are single positions of a dimension.
        whole_of: what the output is a slice of that leaves nothing out.
        later: ids of tensor arguments whose memory is written by operators that run after this one.
        unbound: (parameter name, dim) -> why a dimension stays that had met nothing when it was frozen.
        offered: whether the rule had such dimensions to offer.
        refused: whether labels were frozen for meeting a dimension without any.
        idle: numbers of the outputs that nothing reads.
    """

    name: str
    module: str
    arguments: dict[str, Any]
    outputs: list[tuple[int, ...]]
    table: LabelTable
    reasons: list[Why]
    notes: Notes = field(default_factory=Notes)
    frozen_causes: int = 0
    target: Any = None
    zero: bool | None = None
    constant: bool = False
    declined: str = ""
    open: frozenset[int] = frozenset()
    later: frozenset[int] = frozenset()
    unbound: dict[tuple[str, int], Why] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    whole_of: Value | None = None
    offered: bool = False
    refused: bool = False
    idle: frozenset[int] = frozenset()
    _values: list[Value] | None = None

    def __getitem__(self, argument: str) -> Any:
        """Returns an argument by its schema name, None when it was left to its default."""
        return self.arguments.get(argument)

    def get(self, argument: str, default: Any) -> Any:
        """Returns an argument by its schema name, or `default`."""
        value = self.arguments.get(argument)
        return default if value is None else value

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.outputs[0]

    def values(self) -> list[Value]:
        """Returns all tensor arguments, those inside lists included."""
        if self._values is None:
            self._values = self._find_values()
        return self._values

    def _find_values(self) -> list[Value]:
        found: list[Value] = []
        for argument in self.arguments.values():
            if isinstance(argument, Value):
                found.append(argument)
            elif isinstance(argument, (list, tuple)):
                found.extend(v for v in argument if isinstance(v, Value))
        return found

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def dim(self, value: Value, dim: int) -> Dim:
        """Returns the labels of one dimension; a parameter's unmet dimension gets fresh ones."""
        labels = value.labels[dim]
        if labels is UNBOUND:
            labels = value.labels[dim] = self.table.fresh(value.shape[dim]) if value.shape[dim] > 1 else None
        return labels  # type: ignore[no-any-return]

    def dims(self, value: Value) -> Labels:
        """Returns the labels of all dimensions."""
        return [self.dim(value, d) for d in range(len(value.shape))]

    def uniform(self, dim: int) -> Dim:
        """Returns the labels of an output dimension along which one value is repeated: it can be as long as whatever it meets.

        There are none unless that keeps something else from being frozen.
        """
        self.offered = self.offered or self.shape[dim] > 1
        return self.table.fresh(self.shape[dim]) if dim in self.open and self.shape[dim] > 1 else None

    def written(self, value: Value) -> bool:
        """Returns whether the memory of a tensor argument is written by an operator that runs later."""
        return id(value) in self.later

    # -- coupling ----------------------------------------------------------------------------------------------------------------

    def reason(self, text: str, remedy: str = "") -> int:
        """Returns a number for a reason of this operator, to be given to the label algebra."""
        why = Why(text, self.name, self.module, remedy)
        if not self.reasons or self.reasons[-1] != why:
            self.reasons.append(why)
        return len(self.reasons) - 1

    def equal(self, a: Dim, b: Dim, text: str = "meets a dimension that cannot shrink") -> Dim:
        """Makes two dimensions of one size live and die together; returns their common labels."""
        if a is None and b is None:
            return None
        if a is None or b is None:
            before = self.frozen_causes
            self.freeze(b if a is None else a, text)
            self.refused = self.refused or self.frozen_causes > before
            return None
        if a is not b:
            self.frozen_causes += self.table.unify(a, b, self.reason(text))
        return a

    def bind(self, value: Value, dim: int, labels: Dim, text: str = "meets a dimension that cannot shrink") -> Dim:
        """Makes a dimension of a value equal to given labels; an unmet parameter dimension simply takes them."""
        if value.labels[dim] is UNBOUND:
            value.labels[dim] = labels
            return labels
        return self.equal(value.labels[dim], labels, text)

    def freeze(self, labels: Dim, text: str, remedy: str = "") -> None:
        """Freezes labels, with the reason as a phrase that completes "stays because it ..."."""
        if labels is not None:
            self.frozen_causes += self.table.freeze(labels, self.reason(text, remedy))

    def freeze_value(self, value: Value, text: str, remedy: str = "", keep: Iterable[int] = ()) -> None:
        """Freezes all dimensions of a value but those listed in `keep`."""
        kept = {d % max(len(value.shape), 1) for d in keep}
        for d in range(len(value.shape)):
            if d not in kept:
                if value.labels[d] is UNBOUND:
                    value.labels[d] = None
                    if value.shape[d] > 1:
                        self.unbound[(value.name, d)] = Why(text, self.name, self.module, remedy)
                self.freeze(value.labels[d], text, remedy)

    def keep(self, value: Value) -> None:
        """Says that an argument is used by itself: where it is a position taken out of a dimension, that position stays."""
        if value.piece is not None:
            self.frozen_causes += self.table.freeze(value.piece.needs, value.piece.reason)

    # -- annotating --------------------------------------------------------------------------------------------------------------

    def extent(self, path: str | Path, labels: Dim) -> None:
        """Says that the integer argument at `path` counts `labels`: after removal it becomes the number that survive."""
        if labels is not None:
            self.notes.extents[(path,) if isinstance(path, str) else path] = labels

    def crop(self, path: str | Path, labels: Dim) -> None:
        """Says that the integer argument at `path` counts `labels` with a minus sign, as padding does that takes away."""
        if labels is not None:
            self.notes.crops[(path,) if isinstance(path, str) else path] = labels

    def remap(self, path: str | Path, labels: Dim, own: Labels | None = None) -> None:
        """Says that the index tensor argument at `path` holds positions of a dimension with `labels`.

        `own` are the labels of the index tensor's own dimensions; by default it has one, with the labels of the positions in it.
        """
        if labels is not None:
            where = (path,) if isinstance(path, str) else path
            self.notes.remaps[where] = labels
            if own is not None:
                self.notes.tables[where] = own

    def explicit(self, argument: str, value: object, labels: Dim) -> None:
        """Says that `argument` must be passed as `value` once `labels` has lost an index (an implicit default depends on it)."""
        if labels is not None:
            self.notes.constants[argument] = (value, labels)

    def statistic(self, labels: Dim) -> None:
        """Says that the operator takes a statistic across `labels`: removal changes what it computes."""
        if labels is not None:
            self.notes.statistics.append(labels)

    def only_kept(self, labels: Dim) -> None:
        """Says that the masked reference must leave out what is removed here: zeros would make the operator divide by zero."""
        if labels is not None:
            self.notes.kept_only.append(labels)

    def produce(self, value: Value, dim: int) -> None:
        """Says that a parameter's positions along `dim` compute the channels of the output."""
        dim %= max(len(value.shape), 1)
        (self.notes.produces if value.parameter else self.notes.derived).append((value.name, dim))

    def scale(self, value: Value) -> None:
        """Says that a parameter scales channels that have just been normalised, each by itself."""
        if value.parameter:
            self.notes.scales.append(value.name)

    def become(self, target: OpOverload, arguments: dict[str, Any]) -> None:
        """Says which call replaces this one when literals alone cannot state what is left."""
        self.notes.become = (target, arguments)

    def decline(self, why: str) -> Labels:
        """Gives up on this call: everything that enters it freezes, with the reason."""
        self.declined = why
        return [[None] * len(s) for s in self.outputs] if len(self.outputs) != 1 else [None] * len(self.outputs[0])

    def sizes(self, argument: str, sizes: Sequence[object], labels: Sequence[Dim], offset: int = 0) -> None:
        """Says that a list argument states output sizes (entries of -1 take care of themselves)."""
        for i, size in enumerate(sizes):
            if size != -1:
                self.extent((argument, i + offset), labels[i])
