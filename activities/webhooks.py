"""Webhooks: sends one event to one address through the protection chain; an undelivered one is a dead letter."""

from __future__ import annotations

from temporalio import activity

from activities.boundary import boundary
from holdfast.authoring.services import Service
from holdfast.contracts.data import digest
from holdfast.contracts.profile import Effect
from holdfast.contracts.webhooks import Delivered, Hook, Undelivered
from holdfast.engine.runtime import Runtime
from holdfast.engine.webhooks import BadAddress, host_of, page, post
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState, dump, letter_id
from holdfast.reliability.chain import protected
from holdfast.reliability.ledger import Call, KeyConflict, State
from holdfast.telemetry import metrics
from holdfast.telemetry.tracing import span

RETRIES = 15
LONGEST_DELAY_S = 3600.0
"""With these limits an address is tried for about three hours: 0.5 s, 1 s, 2 s, …, an hour."""


class Webhooks:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._letters = DeadLetters(runtime.db)

    @activity.defn(name="deliver")
    async def deliver(self, hook: Hook) -> Delivered:
        """Sends it until the address accepts it. A failure that no retry will fix is a result, not an error."""
        settings = self._runtime.settings
        with boundary(), span(f"deliver {hook.type}", **{"holdfast.key": hook.key}):
            try:
                host = host_of(hook.url, settings.webhook_hosts)
            except BadAddress as bad:
                return Delivered(ok=False, words=str(bad))
            if not settings.webhook_secrets:
                return Delivered(
                    ok=False, words="not sent: the workers have no key to sign it; set HOLDFAST_WEBHOOK_SECRET for them"
                )
            info = activity.info()
            body = hook.body(page(settings.ui_url, info.namespace, hook.workflow_id))

            async def act(attempt: int) -> int:
                return await post(self._runtime.http, hook.url, hook.id, body, settings.webhook_secrets)

            try:
                settled = await protected(self._runtime.guards, _call(hook, host), act)
            except KeyConflict as conflict:
                return Delivered(ok=False, words=str(conflict))
            if settled.state is State.DONE:
                return Delivered(ok=True, words=f"{host} answered {settled.result}")
            return Delivered(ok=False, words=settled.error)

    @activity.defn(name="record_delivery")
    async def record_delivery(self, end: Undelivered) -> None:
        """Keeps an undelivered webhook as a dead letter, or closes the letter when a later delivery succeeded."""
        hook, words = end.hook, end.delivered.words
        id = letter_id(LetterKind.HOOK, hook.key)
        with boundary():
            if end.delivered.ok:
                await self._letters.close(id, LetterState.REPLAYED, words)
                return
            entry = await self._runtime.ledger.entry(hook.key)
            context = {
                "arguments": hook.model_copy(update={"replay": False}).model_dump(mode="json"),
                "attempts": [{**line, "key": hook.key} for line in entry.log] if entry else [],
                "keys": [hook.key] if entry else [],
            }
            common = (LetterState.OPEN, hook.agent, hook.tenant, hook.workflow_id, hook.key_base, hook.key)
            letter = DeadLetter(id, LetterKind.HOOK, *common, hook.type, "", words, dump(context))
            await self._letters.write([letter])
            await self._letters.reopen(id, words, "")
            metrics.dead_letter(LetterKind.HOOK)


def _call(hook: Hook, host: str) -> Call:
    service = Service(f"webhook {host}")
    return Call(
        hook.key,
        hook.key_base,
        "hook",
        hook.type,
        Effect.IDEMPOTENT,
        None,
        digest([hook.url, hook.type, hook.data]),
        service=service.name,
        retries=RETRIES,
        longest_delay_s=LONGEST_DELAY_S,
        agent=hook.agent,
        target=service.target(hook.tenant),
        rule=service.breaker,
    )
