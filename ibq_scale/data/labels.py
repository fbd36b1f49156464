"""Labels as a source has them, and the classes that a data set then has."""

from __future__ import annotations

from dataclasses import dataclass

from ibq_scale.data.encode import UnusableError

UNLABELLED = "unlabelled"
# Above this a number is an identifier and no class; the manifest names every class.
MOST_CLASSES = 1 << 20


@dataclass(frozen=True)
class Labels:
    """Whether samples have labels, and the classes' names where the source knows them."""

    labelled: bool
    names: tuple[str, ...]

    def class_names(self, largest_label: int) -> tuple[str, ...]:
        """`classes[label]` for the manifest: numbers where there are no names."""
        if not self.labelled:
            return (UNLABELLED,)
        return self.names or tuple(str(label) for label in range(largest_label + 1))


def look_at_labels(first: int | None, names: tuple[str, ...]) -> Labels:
    """Decides by the first sample, for all. Hugging Face marks the missing labels of a test split with -1."""
    labelled = first is not None and first >= 0
    return Labels(labelled, names if labelled else ())


def label_of(found: int | None, labels: Labels) -> int:
    """A sample's label: 0 where none has one. UnusableError for one without, or beyond the classes, among others."""
    if not labels.labelled:
        return 0
    if found is None:
        raise UnusableError("has no label, unlike the first sample")
    classes = len(labels.names) or MOST_CLASSES
    if not 0 <= found < classes:
        raise UnusableError(f"label {found} is not one of {classes} classes")
    return found
