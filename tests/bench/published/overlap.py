"""What frameworks compute beside their collectives, where that differs from the trainer's own steps.

Some wait for each collective where they begin it. Gradients of data ranks are then reduced when the last backward pass has ended.

Others cut the products beside tensor-parallel collectives into as many chunks as there are ranks, and send one while they compute
the next: only one chunk's transfer has nothing beside it (userbuffers of NVIDIA's Transformer Engine)."""

from collections.abc import Sequence
from dataclasses import replace

from bagualu.comm.calls import Communication, Waited
from bagualu.parallel.simulation.events import Event, Role, Section

DATA = ("fold", "replica")
"""The groups of data ranks."""


def chunked(roles: Sequence[Role]) -> list[Role]:
    """Returns `roles` with the part of tensor-parallel collectives that has nothing beside it."""

    def first(event: Event) -> Event:
        tensor = isinstance(event, Communication) and event.group == "tensor" and event.kind in ("all_gather", "reduce_scatter")
        return replace(event, bytes=event.bytes // event.size) if tensor else event

    known: dict[int, list[Event]] = {}
    for role in roles:
        for section in role.trace.sections:
            known.setdefault(id(section.events), [first(event) for event in section.events])
    return [_with(role, [replace(section, events=known[id(section.events)]) for section in role.trace.sections]) for role in roles]


def blocking(roles: Sequence[Role]) -> list[Role]:
    """Returns `roles` of which each waits for a collective at once. Messages between pipeline ranks stay as they are."""
    known: dict[int, list[Event]] = {}
    return [_with(role, _sections(role.trace.sections, known)) for role in roles]


def _with(role: Role, sections: list[Section]) -> Role:
    return replace(role, trace=replace(role.trace, sections=sections))


def _sections(sections: Sequence[Section], known: dict[int, list[Event]]) -> list[Section]:
    """Returns the sections of a rank; the reductions of data ranks stand after the last of the pipeline's program."""
    found, postponed = [], []
    last = max((index for index, section in enumerate(sections) if section.action is not None), default=-1)
    for index, section in enumerate(sections):
        moved = DATA if section.action is not None else ()
        postponed += [event for event in section.events if isinstance(event, Communication) and event.group in moved]
        found.append(replace(section, events=_blocking(section.events, moved, known)))
        if index == last and postponed:
            waited = [each for event in postponed for each in (event, Waited(event.kind, event.group))]
            found.append(replace(section, action=None, events=waited))
    return found


def _blocking(events: list[Event], without: Sequence[str], known: dict[int, list[Event]]) -> list[Event]:
    """Returns the events of a section; those of sections that shared their list share it again."""
    if id(events) not in known:
        known[id(events)] = made = []
        for event in events:
            collective = isinstance(event, Communication | Waited) and event.peer is None
            if isinstance(event, Communication) and collective and event.group not in without:
                made += [event, Waited(event.kind, event.group)]
            elif not collective:
                made.append(event)
    return known[id(events)]
