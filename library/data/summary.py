"""What the pictures of a run are, for an adapter's metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from library.data.pictures import Picture
from library.data.settings import DatasetSettings


def describe_datasets(datasets: Sequence[DatasetSettings], pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """JSON-ready: each dataset's resolution, batch size, buckets, and its subsets with their picture counts."""
    described = []
    for index, dataset in enumerate(datasets):
        own = [picture for picture in pictures if picture.dataset == index]
        buckets = Counter(f"{picture.bucket[0]}x{picture.bucket[1]}" for picture in own for _ in range(picture.repeats))
        described.append(
            {
                "resolution": list(dataset.resolution),
                "batch_size_per_device": dataset.batch_size,
                "enable_bucket": dataset.enable_bucket,
                "num_train_images": sum(picture.repeats for picture in own),
                "bucket_info": dict(sorted(buckets.items())),
                "subsets": [
                    {
                        "image_dir": subset.image_dir.name,
                        "img_count": sum(picture.subset is subset for picture in own),
                        "num_repeats": subset.num_repeats,
                    }
                    for subset in dataset.subsets
                ],
            }
        )
    return described


def tag_frequency(pictures: Sequence[Picture]) -> dict[str, dict[str, int]]:
    """{picture folder: {tag: pictures that have it}}, most frequent first."""
    counts: dict[str, Counter[str]] = {}
    for picture in pictures:
        tags = {tag.strip() for tag in picture.caption.split(picture.subset.caption_separator)}
        counts.setdefault(picture.path.parent.name, Counter()).update(sorted(tags - {""}))
    return {folder: dict(counter.most_common()) for folder, counter in counts.items()}
