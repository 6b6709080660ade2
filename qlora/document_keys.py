"""The keys of a recipe that are about documents: what is read, how it is studied, and the exam."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from qlora.recipe_values import Minutes, Section, Share, Text, without_nul


class DocumentsSection(Section):
    """Documents that the base asks itself about: it learns to answer without them."""

    path: Text = Field(description="File, glob or folder of md, html, txt, pdf, docx and epub, relative to the recipe")
    about: Annotated[str, Field(max_length=500), AfterValidator(without_nul)] = Field(
        "", description="One line said before each passage: whose documents these are, and of what"
    )
    language: Annotated[str, Field(max_length=8, pattern=r"^(auto|[a-z]{2,3})$")] = Field(
        "auto", description="Language of the documents, such as en or de; auto is told by their words"
    )


class StudySection(Section):
    """How the base asks itself about [[data.documents]]."""

    questions: Annotated[int, Field(ge=1, le=1000)] = Field(
        24, description="Questions asked of each passage, spread over its sentences"
    )
    kinds: Annotated[tuple[Literal["fact", "backward", "how", "list", "compare", "case"], ...], Field(min_length=1)] = (
        Field(("fact", "backward", "how", "list", "compare", "case"), max_length=6, description="Kinds of questions")
    )
    labels: Literal["soft", "hard"] = Field(
        "soft", description="What is learnt: the base's probabilities as it read the passage, or its words alone"
    )
    sure: float = Field(0.5, ge=0, le=1, description="Answers of a lower mean probability a token are left out")
    with_passage: Share = Field(
        0.1, description="Share of rows that show the passage beside two others: retrieval helps the tuned model too"
    )
    hold: Share = Field(
        0.1, description="Share of rows on other things, answered by the base: the rest stays as it was"
    )
    probe: bool = Field(True, description="Ask 20 questions first, and stop where the base cannot read the answers")
    passage_tokens: int = Field(400, ge=64, le=8192, description="Longest passage, in tokens of the base")
    max_minutes: Minutes | None = Field(None, description="Time limit of asking; then it goes on with what there is")


class QuestionsSection(Section):
    """Questions of your own for the exam."""

    path: Text = Field(description="JSON, JSONL or CSV of question and answer, relative to the recipe")
    columns: dict[Text, Text] = Field(
        default_factory=dict, max_length=10, description="Your column's name by ours: {question = 'frage'}"
    )


class ExamSection(Section):
    """What the model is asked before and after it has learnt documents."""

    questions: Annotated[int, Field(ge=0, le=100_000)] = Field(
        200, description="Facts of the study asked in other words, which are never trained"
    )
    left_out: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.05, description="Share of sentences that are never studied: the control"
    )
    own: tuple[QuestionsSection, ...] = Field(
        (),
        max_length=100,
        description="Your own questions, as [[exam.questions]] tables ([[exam.own]] beside a number)",
    )

    @model_validator(mode="before")
    @classmethod
    def _tables_of_questions(cls, given: Any) -> Any:
        """TOML has one key of a name: [[exam.questions]] are those of `own`, with the usual number beside them."""
        if isinstance(given, dict) and isinstance(given.get("questions"), list | tuple) and "own" not in given:
            return {("own" if key == "questions" else key): value for key, value in given.items()}
        return given
