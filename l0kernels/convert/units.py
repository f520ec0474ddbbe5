# SPDX-License-Identifier: Apache-2.0
"""Find which units can be gated: who makes them, who reads them, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from l0kernels.convert.probe import FEW, Change, Probe, bits, feature_dim, spell

# Layers whose outputs meet in one product; a residual stream joins more, or adds.
MOST_FACTORS = 3

Tick = Callable[[], Any]


@dataclass
class Units:
    """Units that one set of gates opens and closes.

    Args:
        name: of the group: the layer that makes them first, or ``"<reader>.heads"``.
        size: number of units.
        makers: by layer, the unit of each of its outputs, int64 [width].
        readers: by layer or passage, the unit of each of its features, -1 where none,
            int64 [features].
        problem: why they cannot be gated exactly, or None.
    """

    name: str
    size: int
    makers: dict[str, Tensor]
    readers: dict[str, Tensor] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class Survey:
    """Everything that probing a model told.

    Args:
        units: every layer makes one of them, in the order of first calls; heads come last.
        outputs: by layer, the result of the model that its units reach.
        sums: sets of layers whose units meet in one feature, but not as factors or mixed.
        read_by: by layer, the layers and passages that its units reach.
        readers: layers and passages in the order of their first call.
        layers: those among them that make units.
        features: number of features that each reads.
        calls: how often each is called in a forward.
        positions: output positions of one example per layer.
        used_outside: modules whose parameters are used outside their own forward.
        misplaced: by name of units, why their gates cannot have the place that is asked for.
    """

    units: list[Units]
    outputs: dict[str, str]
    sums: list[set[str]]
    read_by: dict[str, list[str]]
    readers: list[str]
    layers: list[str]
    features: dict[str, int]
    calls: dict[str, int]
    positions: dict[str, int]
    used_outside: set[str]
    misplaced: dict[str, str] = field(default_factory=dict)


def survey(
    probe: Probe,
    usable: Callable[[str], bool],
    heads: bool,
    progress: Callable[[int], Tick] | None = None,
) -> Survey:
    """Probe a model for units.

    Args:
        probe: an entered probe.
        usable: whether a layer itself could make gated units; saves replays for products.
        heads: look for attention heads too.
        progress: called with the number of steps, returns a function to call after each.
    """
    return _Surveyor(probe, usable, progress).run(heads)


class _Surveyor:
    def __init__(
        self,
        probe: Probe,
        usable: Callable[[str], bool],
        progress: Callable[[int], Tick] | None,
    ) -> None:
        self.probe = probe
        self.usable = usable
        self.progress = progress
        self.outputs: dict[str, str] = {}
        self.others: dict[str, set[str]] = {}
        # Sets of layers that meet where units mix, as query, key and value do.
        self.mixing: list[tuple[str, ...]] = []
        # By reader: which layers touch which of its features.
        self.touches: dict[str, dict[str, Tensor]] = {name: {} for name in probe.readers}

    def _ticks(self, steps: int) -> Tick:
        return self.progress(steps) if self.progress is not None and steps else lambda: None

    def run(self, heads: bool) -> Survey:
        tick = self._ticks(len(self.probe.layers))
        for seed, name in enumerate(self.probe.layers):
            self._reach(name, seed)
            tick()
        self.joined = self._joined()
        factors = self._annihilating(self._candidates())
        spelled = self._spell(factors)
        products = [p for s in factors if (p := self._product(s, spelled)) is not None]
        units = self._in_order(products, spelled)
        if heads:
            units += self._heads({maker for product in products for maker in product.makers})
        known = [set(names) for names in (*(p.makers for p in products), *self.mixing)]
        return Survey(
            units=units,
            outputs=self.outputs,
            sums=[set(j) for j in self.joined if set(j) not in known],
            read_by={name: self._read_by(name) for name in self.probe.layers},
            readers=self.probe.readers,
            layers=self.probe.layers,
            features={name: self.probe.features(name) for name in self.probe.readers},
            calls=self.probe.calls,
            positions=self.probe.positions(),
            used_outside=self.probe.used_outside,
        )

    def _reach(self, name: str, seed: int) -> None:
        everything = torch.ones(self.probe.width[name], dtype=torch.bool)
        found = self.probe.touched({name: everything}, seed, FEW)
        if found.output is not None:
            self.outputs[name] = found.output
        self.others[name] = found.others
        for reader, features in found.features.items():
            if features.any():
                self.touches[reader][name] = features

    def _read_by(self, name: str) -> list[str]:
        return [reader for reader, touches in self.touches.items() if name in touches]

    def _joined(self) -> list[tuple[str, ...]]:
        """Sets of layers that meet in a feature, each once."""
        found: dict[tuple[str, ...], None] = {}
        for touches in self.touches.values():
            if len(touches) > 1:
                names = list(touches)
                columns = torch.stack([touches[n] for n in names]).unique(dim=1)
                for column in columns.T.tolist():
                    met = tuple(n for n, there in zip(names, column, strict=True) if there)
                    if len(met) > 1:
                        found[met] = None
        return list(found)

    def _components(self) -> list[tuple[str, ...]]:
        """Layers that meet, directly or through others, in the order of their calls."""
        parent = {name: name for name in self.probe.layers}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        for met in self.joined:
            for other in met[1:]:
                parent[root(other)] = root(met[0])
        members: dict[str, list[str]] = {}
        for name in self.probe.layers:
            members.setdefault(root(name), []).append(name)
        return [tuple(m) for m in members.values() if len(m) > 1]

    # What each unit becomes.

    def _spell(self, factors: list[tuple[str, ...]]) -> dict[str, dict[str, Tensor]]:
        """Units of the layers that meet no other, and of the factors of products."""
        meeting = {name for met in self.joined for name in met}
        alone = [n for n in self.probe.layers if n not in meeting and self._may_be_gated(n)]
        # Layers of one round do not meet; factors of a product do.
        rounds = [alone, *([s[i] for s in factors if len(s) > i] for i in range(MOST_FACTORS))]
        rounds[0] += rounds.pop(1)
        return self._spell_rounds(
            [{n: torch.arange(self.probe.width[n]) + 1 for n in names} for names in rounds if names]
        )

    def _spell_rounds(self, rounds: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """By layer and reader, the number less 1 of every feature, -1 for none, -2 for several."""
        tick = self._ticks(sum(2 * bits(numbers) for numbers in rounds))
        found: dict[str, dict[str, Tensor]] = {}
        for numbers in rounds:
            spelled = spell(self.probe, numbers, tick)
            for name in numbers:
                found[name] = {}
                for reader in self._read_by(name):
                    number, mine = spelled[reader], self.touches[reader][name]
                    unit = torch.where(number > 0, number - 1, number)
                    found[name][reader] = torch.where(mine, unit, -1)
        return found

    def _may_be_gated(self, name: str) -> bool:
        return self.usable(name) and name not in self.outputs

    def _in_order(
        self, products: list[Units], spelled: Mapping[str, Mapping[str, Tensor]]
    ) -> list[Units]:
        """Units in the order of their first maker; factors are no units by themselves."""
        by_maker = {maker: product for product in products for maker in product.makers}
        ordered: list[Units] = []
        for name in self.probe.layers:
            product = by_maker.get(name)
            if product is None:
                ordered.append(self._single(name, spelled.get(name)))
            elif product.name == name:
                ordered.append(product)
        return ordered

    def _single(self, name: str, spelled: Mapping[str, Tensor] | None) -> Units:
        width = self.probe.width[name]
        units = Units(name, width, {name: torch.arange(width)})
        for reader in self._read_by(name):
            none = torch.full((self.probe.features(reader),), -1)
            unit = none if spelled is None else spelled[reader]
            units.readers[reader] = unit.clamp_min(-1)
            problem = self._who_is_met(name, reader)
            if problem is None and spelled is not None:
                problem = self._why_unclear(name, reader, unit)
            units.problem = units.problem or problem
        return units

    def _who_is_met(self, name: str, reader: str) -> str | None:
        touches = self.touches[reader]
        mine = touches[name]
        met = [n for n, there in touches.items() if n != name and bool((there & mine).any())]
        if not met:
            return None
        shown = ", ".join(met[:3]) + (", ..." if len(met) > 3 else "")
        stream = "" if self._meet_only_in(reader) else " (residual stream)"
        return f"its units are joined with those of {shown} before {reader}{stream}"

    def _why_unclear(self, name: str, reader: str, unit: Tensor) -> str | None:
        if bool((unit == -2).any()):
            return f"its units are mixed with one another before {reader}{self._through(name)}"
        if len(set(unit[unit >= 0].tolist())) < self.probe.width[name]:
            return f"only some of its units reach {reader}"
        return None

    def _through(self, name: str) -> str:
        """Modules with parameters on the way, which often explain the mixing."""
        kinds = [f"{type(self.probe.modules[n]).__name__} {n}" for n in sorted(self.others[name])]
        return f" (they pass through {', '.join(kinds[:2])})" if kinds else ""

    # Products of several layers.

    def _candidates(self) -> list[tuple[str, ...]]:
        """Sets of layers that could be factors: few, each to be gated, with unmixed units."""
        sets = [
            s
            for s in self._components()
            if len(s) <= MOST_FACTORS and all(self._may_be_gated(name) for name in s)
        ]
        for i in range(MOST_FACTORS):
            names = [s[i] for s in sets if len(s) > i]
            first, second = (self._touched_by_unit(names, unit) for unit in (0, 1))
            mixed = {reader: first[reader] & second[reader] for reader in self.touches}
            self.mixing += [s for s in sets if len(s) > i and self._meets_any(s[i], mixed)]
            sets = [s for s in sets if s not in self.mixing]
        return sets

    def _meets_any(self, name: str, features: Mapping[str, Tensor]) -> bool:
        return any(
            bool((touches[name] & features[reader]).any())
            for reader, touches in self.touches.items()
            if name in touches
        )

    def _touched_by_unit(self, names: list[str], unit: int) -> dict[str, Tensor]:
        """Features that change with one unit of each of some layers that do not meet."""
        chosen = {name: torch.arange(self.probe.width[name]) == unit for name in names}
        return self.probe.touched(chosen, 2000 + unit, FEW).features

    def _product(
        self, names: tuple[str, ...], spelled: Mapping[str, Mapping[str, Tensor]]
    ) -> Units | None:
        if all(self._unmixed(name, spelled[name]) for name in names):
            return self._align(names, spelled)
        return None

    def _unmixed(self, name: str, units: Mapping[str, Tensor]) -> bool:
        """Whether every reader gets all units of a layer one to one."""
        width = self.probe.width[name]
        return bool(units) and all(
            not bool((unit == -2).any()) and len(set(unit[unit >= 0].tolist())) == width
            for unit in units.values()
        )

    def _annihilating(self, sets: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Those sets in which, of any two layers that meet, one can cancel all effect of the other.

        A product has this property (a factor 0, or a saturated gate); a sum has not.
        """
        pairs = [(s, i, j) for s in sets for i in range(len(s)) for j in range(len(s)) if i != j]
        cancels: dict[tuple[str, str], bool] = {}
        places = sorted({(i, j) for _, i, j in pairs})
        tick = self._ticks(len(places))
        for i, j in places:
            chosen = [(s[i], s[j]) for s in sets if len(s) > max(i, j)]
            cancels.update(zip(chosen, self._cancelled(chosen), strict=True))
            tick()
        return [
            s
            for s in sets
            if all(
                cancels[a, b] or cancels[b, a]
                for k, a in enumerate(s)
                for b in s[k + 1 :]
                if self._meeting(a, b)
            )
        ]

    def _meeting(self, a: str, b: str) -> dict[str, Tensor]:
        """By reader, the features that two layers both touch."""
        both = {
            reader: touches[a] & touches[b]
            for reader, touches in self.touches.items()
            if a in touches and b in touches
        }
        return {reader: features for reader, features in both.items() if features.any()}

    def _cancelled(self, pairs: list[tuple[str, str]]) -> list[bool]:
        """For pairs (a, b): whether some constant output of a makes all changes of b vanish."""
        meeting = [self._meeting(a, b) for a, b in pairs]
        readers = {reader for features in meeting for reader in features}
        result = [False] * len(pairs)
        for constant in (0.0, -1e6, 1e6):
            fixed = {a: _constant(constant) for a, _ in pairs}
            base = self.probe.inputs_with(fixed, readers)
            same = [bool(features) for features in meeting]
            for shift in (1.0, 1e9, -1e9):
                moved = fixed | {b: _moved(shift) for _, b in pairs}
                found = self.probe.inputs_with(moved, readers)
                for k, features in enumerate(meeting):
                    same[k] = same[k] and self._equal(base, found, features)
            result = [before or now for before, now in zip(result, same, strict=True)]
        return result

    def _equal(
        self,
        first: Mapping[str, list[Tensor]],
        second: Mapping[str, list[Tensor]],
        features: Mapping[str, Tensor],
    ) -> bool:
        for reader, where in features.items():
            dim = feature_dim(self.probe.modules[reader])
            index = where.nonzero().flatten()
            for x, y in zip(first[reader], second[reader], strict=True):
                chosen = index.to(x.device)
                if not torch.equal(x.index_select(dim, chosen), y.index_select(dim, chosen)):
                    return False
        return True

    def _align(
        self, names: tuple[str, ...], spelled: Mapping[str, Mapping[str, Tensor]]
    ) -> Units | None:
        """One set of units for factors whose units match one to one, else None."""
        lead = names[0]
        width = self.probe.width[lead]
        units = Units(lead, width, {lead: torch.arange(width)}, dict(spelled[lead]))
        for name in names[1:]:
            maker = _match(spelled[name], units.readers, self.probe.width[name], width)
            if maker is None:
                return None
            units.makers[name] = maker
            for reader, unit in spelled[name].items():
                mine = torch.where(unit >= 0, maker[unit.clamp_min(0)], -1)
                known = units.readers.get(reader, torch.full_like(mine, -1))
                units.readers[reader] = torch.where(known >= 0, known, mine)
        return units

    # Attention heads.

    def _heads(self, factors: set[str]) -> list[Units]:
        meeting = {r: self._meet_only_in(r) for r in self.probe.layers}
        candidates = {r: n for r, n in meeting.items() if n and not factors & set(n)}
        sizes = {r: self._head_count(r, names) for r, names in candidates.items()}
        candidates = {r: names for r, names in candidates.items() if sizes[r] > 1}
        fused = [u for r in self.probe.layers if (u := self._fused_heads(r)) is not None]
        if not candidates:
            return fused
        rounds = [
            {
                names[i]: self._blocks(names[i], sizes[r]) + 1
                for r, names in candidates.items()
                if len(names) > i
            }
            for i in range(max(len(names) for names in candidates.values()))
        ]
        spelled = self._spell_rounds(rounds)
        heads = [self._head_units(r, n, sizes[r], spelled) for r, n in candidates.items()]
        return heads + fused

    def _meet_only_in(self, reader: str) -> list[str]:
        """Layers that meet in all features of one reader and reach no other."""
        touches = self.touches[reader]
        names = [n for n in touches if self.usable(n) and self._read_by(n) == [reader]]
        whole = all(bool(touches[n].all()) for n in touches)
        return names if whole and len(names) == len(touches) > 1 else []

    def _head_count(self, reader: str, names: Iterable[str]) -> int:
        """Number of parts in which the first unit of each layer says the features fall."""
        widest = 0
        for seed, name in enumerate(names):
            first = torch.arange(self.probe.width[name]) == 0
            found = self.probe.touched({name: first}, seed).features[reader]
            widest = max(widest, int(found.sum()))
        features = self.probe.features(reader)
        count = features // max(widest, 1)
        widths = (features, *(self.probe.width[name] for name in names))
        fits = widest > 1 and all(width % count == 0 for width in widths)
        return count if fits else 1

    def _fused_heads(self, reader: str) -> Units | None:
        """Heads whose query, key and value one layer makes together, such as GPT-2's.

        They have gates where they are read; the layer computes all of them.
        """
        touches = self.touches[reader]
        features = self.probe.features(reader)
        names = list(touches)
        if len(names) != 1 or self.probe.width[names[0]] <= features:
            return None
        count = self._head_count(reader, names)
        last = torch.arange(self.probe.width[names[0]]) == self.probe.width[names[0]] - 1
        values = int(self.probe.touched({names[0]: last}, 0).features[reader].sum())
        # A query reaches all features of its head, a value its own.
        if count == 1 or not 0 < values < features // count:
            return None
        head = torch.arange(features) // (features // count)
        return Units(f"{reader}.heads", count, {}, {reader: head})

    def _blocks(self, name: str, count: int) -> Tensor:
        width = self.probe.width[name]
        return torch.arange(width) // (width // count)

    def _head_units(
        self,
        reader: str,
        names: list[str],
        count: int,
        spelled: Mapping[str, Mapping[str, Tensor]],
    ) -> Units:
        features = self.probe.features(reader)
        head = torch.arange(features) // (features // count)
        makers = {name: self._blocks(name, count) for name in names}
        units = Units(f"{reader}.heads", count, makers, {reader: head})
        if any(not torch.equal(spelled[name][reader], head) for name in names):
            units.problem = f"its heads are mixed with one another before {reader}"
        return units


def _match(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], width: int, size: int
) -> Tensor | None:
    """Whose unit each of my units meets, int64 [width]; None unless one to one."""
    maker = torch.full((width,), -1)
    for reader in set(mine) & set(theirs):
        both = (mine[reader] >= 0) & (theirs[reader] >= 0)
        own, other = mine[reader][both], theirs[reader][both]
        known = maker[own]
        if bool(((known >= 0) & (known != other)).any()):
            return None
        maker[own] = other
        if not torch.equal(maker[own], other):
            return None
    one_to_one = width == size and torch.equal(maker.sort().values, torch.arange(size))
    return maker if one_to_one else None


def _constant(value: float) -> Change:
    return lambda out: torch.full_like(out, value)


def _moved(shift: float) -> Change:
    return lambda out: out + shift
