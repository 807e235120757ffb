"""A slice of `python -m bench.load.contracts`."""

from pathlib import Path

from agents.contracts.collect import collect
from bench.load.batches import STAGES, Field, claims, kills


async def test_with_a_worker_of_each_stage_killed_every_document_is_done_once(
    tmp_path: Path,
) -> None:
    collect(tmp_path / "texts", 12)
    (tmp_path / "texts" / "empty.txt").touch()
    async with Field.open(tmp_path / "home", think_s=0.1) as field:
        for stage in STAGES:
            await field.hire(stage)
        calm = await field.batch("calm", tmp_path / "texts")
        deaths = kills(12, 1, seed=3)
        killed = await field.batch("killed", tmp_path / "texts", deaths)
    assert killed.result.items is not None
    assert (killed.result.items.done, killed.result.items.failed) == (12, 1)
    assert {words: holds for words, holds in claims(calm, killed, len(deaths)).items() if not holds} == {}
