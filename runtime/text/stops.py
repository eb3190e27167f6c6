"""Stop strings in streamed text: nothing is emitted that a stop string may still swallow."""

import re
from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string to be completed, in text that comes in parts.

    The stop string that ends first wins, and of those that end at the same character the longest. This is the one rule
    under which a match needs no text behind it (generation can stop at once) and does not depend on how the text is
    cut. It differs from the leftmost match only where one stop string lies inside another.

    Time is linear in the text and independent of the number of stop strings (Aho and Corasick 1975); building takes
    time linear in their total length.

    Args:
        stops: stop strings, none of them empty.
        include_stop: a match is emitted, not cut off.
    """

    __slots__ = ("_can_start", "_depth", "_fail", "_goto", "_held", "_include_stop", "_match", "_matched", "_node")

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._include_stop = include_stop
        self._matched: str | None = None
        self._held = ""  # the text on the path from the root to the current node
        self._node = 0
        self._goto: list[dict[str, int]] = [{}]  # [num_nodes] children by character
        self._depth = [0]  # [num_nodes] characters from the root
        self._fail = [0]  # [num_nodes] the node of the longest proper suffix that starts a stop string
        self._match: list[str | None] = [None]  # [num_nodes] the longest stop string that ends at the node
        for stop in stops:
            self._add(stop)
        self._link()
        first = "".join(map(re.escape, self._goto[0]))
        self._can_start = re.compile(f"[{first}]" if first else r"(?!)").search

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be emitted, and the stop string if one is now complete.

        After a match the text has ended: what is pushed later is dropped, and the match is returned again.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._goto[0]:
            return text, None
        if not self._held:
            start = self._can_start(text)
            if start is None:
                return text, None
            position = start.start()
        else:
            position = 0
        total = self._held + text
        offset = len(self._held)
        goto, fail, node = self._goto, self._fail, self._node
        while position < len(text):
            char = text[position]
            following = goto[node].get(char)
            while following is None and node:
                node = fail[node]
                following = goto[node].get(char)
            position += 1
            if following is None:  # at the root: on to the next character that starts a stop string
                start = self._can_start(text, position)
                if start is None:
                    break
                position = start.start()
                continue
            node = following
            stop = self._match[node]
            if stop is not None:
                end = offset + position
                self._matched, self._held = stop, ""
                return total[: end if self._include_stop else end - len(stop)], stop
        self._node = node
        cut = len(total) - self._depth[node]
        self._held = total[cut:]
        return total[:cut], None

    def finish(self) -> str:
        """The text held back: no stop string can come any more."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._goto[node].get(char)
            if child is None:
                child = len(self._goto)
                self._goto[node][char] = child
                self._goto.append({})
                self._depth.append(self._depth[node] + 1)
                self._fail.append(0)
                self._match.append(None)
            node = child
        self._match[node] = stop

    def _link(self) -> None:
        queue = deque(self._goto[0].values())
        while queue:  # breadth first: the failure link of a node points to a shallower one
            node = queue.popleft()
            for char, child in self._goto[node].items():
                link = self._fail[node]
                while link and char not in self._goto[link]:
                    link = self._fail[link]
                self._fail[child] = self._goto[link].get(char, 0)
                if self._match[child] is None:
                    self._match[child] = self._match[self._fail[child]]
                queue.append(child)
