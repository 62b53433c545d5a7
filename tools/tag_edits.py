"""Changes to the tags of a caption; what they leave alone stays as it was written, to the byte."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Tags without two letters or digits in a row are emoticons: ^_^, o_o, >_<, (o)_(o), 6_9. Their underscore is a mouth.
_WORD = re.compile(r"[^\W_]{2}")
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class TagEdits:
    """What is done to each line, in this order: underscores, replacing, removing, dedupe, trigger.

    trigger: one tag or several, separated. removed, replaced: tags, by the words they have after underscores were
    replaced or as they were written. mark: text between tags that divides a line, as keep_tokens_separator does.
    """

    trigger: str = ""
    underscores_to_spaces: bool = False
    removed: tuple[str, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)
    dedupe: bool = False
    separator: str = ","
    mark: str = ""

    @property
    def do_anything(self) -> bool:
        """Whether any edit is asked for."""
        wanted = (self.trigger.strip(), self.underscores_to_spaces, self.removed, self.replaced, self.dedupe)
        return any(wanted)

    def edit_text(self, text: str) -> str:
        """A caption file's text, each line of which is a caption; lines without text stay as they are.

        A text that has none gets the trigger, as a caption file that is empty belongs to a picture all the same.
        """
        start = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
        lines = text[len(start) :].splitlines(keepends=True)
        if not any(line.strip() for line in lines):
            return start + self.edit_line("") + "".join(lines)
        return start + "".join(self._edit_with_end(line) if line.strip() else line for line in lines)

    def _edit_with_end(self, line: str) -> str:
        written = line.rstrip()
        return self.edit_line(written) + line[len(written) :]

    def edit_line(self, line: str) -> str:
        """One caption."""
        sections = line.split(self.mark) if self.mark else [line]
        before = [self._tags(section) for section in sections]
        after = self._edit_tags(before)
        if after == before:
            return line
        joined = [f"{self.separator} ".join(tags) for tags in after]
        return f" {self.mark} ".join(joined).strip()

    def _edit_tags(self, sections: list[list[str]]) -> list[list[str]]:
        seen, edited = set(), []
        trigger = self._tags(self.trigger)
        for tags in sections:
            kept = []
            for written in tags:
                tag = self._renamed(written)
                is_again = self.dedupe and tag in seen
                if tag is not None and not is_again and not {written, tag} & set(trigger):
                    kept.append(tag)
                    seen.add(tag)
            edited.append(kept)
        edited[0] = [*trigger, *edited[0]]
        return edited

    def _renamed(self, tag: str) -> str | None:
        """None for a tag that is taken out."""
        spaced = tag
        if self.underscores_to_spaces and _WORD.search(tag):
            spaced = " ".join(tag.replace("_", " ").split())
        if {tag, spaced} & set(self.removed):
            return None
        renamed = self.replaced.get(tag, self.replaced.get(spaced, spaced)).strip()
        return None if renamed in self.removed else renamed

    def _tags(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self.separator) if tag.strip()]
