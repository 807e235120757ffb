"""The recorded model call as a LangChain chat model, for nodes that were written for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable

from holdfast.graph import Turn
from holdfast.tools import Tool


class RecordedChatModel(BaseChatModel):
    """`Turn.ask` behind LangChain's interface. It offers no tools until `bind_tools` names some of the agent's."""

    turn: Any
    label: str = ""

    @property
    def _llm_type(self) -> str:
        return "holdfast"

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: str | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """tools: the agent's, by name or as the objects that they were made from. Raises for a forced choice."""
        if tool_choice not in (None, "auto"):
            raise NotImplementedError("the recorded model lets the model choose: tool_choice has to be None or 'auto'")
        names = [each if isinstance(each, str | Tool | dict) else each.name for each in tools]
        return self.bind(tools=names, **kwargs)  # type: ignore[return-value] - it returns messages

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if stop:
            raise NotImplementedError("the recorded model knows no stop words")
        turn: Turn = self.turn
        answer = await turn.ask(messages, tools=kwargs.get("tools", ()), name=self.label)
        raw = answer.message.get("tool_calls")
        # From there AIMessage reads the calls, those with broken arguments as well.
        message = AIMessage(answer.text, additional_kwargs={"tool_calls": raw} if raw else {})
        read, written = answer.usage.input_tokens, answer.usage.output_tokens
        message.usage_metadata = UsageMetadata(input_tokens=read, output_tokens=written, total_tokens=read + written)
        message.response_metadata = {"model_name": answer.model, "finish_reason": answer.finish_reason}
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        raise NotImplementedError("the recorded model is asynchronous: await model.ainvoke(…)")
