"""A workflow with a patch: a parcel used to be handed over at once, and now waits for a signature."""

from temporalio import workflow


@workflow.defn(name="Handover")
class Before:
    @workflow.run
    async def run(self) -> str:
        await workflow.sleep(0.01)
        return "handed over"


@workflow.defn
class Handover:
    def __init__(self) -> None:
        self.signed_by = ""

    @workflow.run
    async def run(self) -> str:
        await workflow.sleep(0.01)
        if not self.signed_by and workflow.patched("waits-for-signature"):
            await workflow.wait_condition(lambda: self.signed_by != "")
        return "handed over"

    @workflow.signal
    def sign(self, by: str) -> None:
        self.signed_by = by
