"""Steps of frameworks that wait for each collective where they begin it, and so compute nothing beside it."""

from collections.abc import Sequence
from dataclasses import replace

from bagualu.comm.calls import Communication, Waited
from bagualu.parallel.simulation.events import Event, Role


def blocking(roles: Sequence[Role]) -> list[Role]:
    """Returns `roles` of which each waits for a collective at once. Messages between pipeline ranks stay as they are."""
    known: dict[int, list[Event]] = {}
    found = []
    for role in roles:
        sections = [replace(section, events=_blocking(section.events, known)) for section in role.trace.sections]
        found.append(replace(role, trace=replace(role.trace, sections=sections)))
    return found


def _blocking(events: list[Event], known: dict[int, list[Event]]) -> list[Event]:
    """Returns the events of a section; those of sections that shared their list share it again."""
    if id(events) not in known:
        known[id(events)] = []
        for event in events:
            if isinstance(event, Waited) and event.peer is None:
                continue
            known[id(events)].append(event)
            if isinstance(event, Communication) and event.peer is None:
                known[id(events)].append(Waited(event.kind, event.group))
    return known[id(events)]
