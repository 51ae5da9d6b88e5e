"""Settings: frozen dataclasses, read from YAML files and the command line."""

from __future__ import annotations

from typing import ClassVar


class Variants:
    """Base of settings that come in several kinds: the key `name` of the YAML mapping says which."""

    name: ClassVar[str]

    @classmethod
    def variants(cls) -> dict[str, type]:
        """Every kind by its name, subclasses of subclasses included."""
        found = {cls.name: cls} if "name" in vars(cls) else {}
        for sub in cls.__subclasses__():
            found |= sub.variants()
        return found
