"""The recorded model call as a LangChain chat model, for nodes written for LangChain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable

from holdfast.authoring.options import ModelAnswer
from holdfast.authoring.tools import Tool


class Asks(Protocol):
    """The part of a turn that a chat model needs."""

    async def ask(self, messages: Sequence[Any], *, tools: Any, name: str) -> ModelAnswer: ...


class RecordedChatModel(BaseChatModel):
    """`Turn.ask` behind LangChain's interface. It offers no tools until `bind_tools` names tools of the agent."""

    turn: Any
    label: str = ""

    @property
    def _llm_type(self) -> str:
        return "holdfast"

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: str | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offers tools of the agent, given by name or as the objects they were made from.

        Raises NotImplementedError for a forced tool choice.
        """
        if tool_choice not in (None, "auto"):
            raise NotImplementedError(
                "the recorded model does not support a forced tool choice: pass tool_choice=None or 'auto'"
            )
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
            raise NotImplementedError("the recorded model does not support stop words: leave `stop` out")
        turn: Asks = self.turn
        answer = await turn.ask(messages, tools=kwargs.get("tools", ()), name=self.label)
        raw = answer.message.get("tool_calls")
        # AIMessage parses the calls from additional_kwargs, also those with invalid arguments.
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
        raise NotImplementedError("the recorded model is asynchronous: use `await model.ainvoke(…)`")
