"""The options of `generate` and `chat` that say how tokens are drawn."""

from typing import Annotated

import typer

Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest; 0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that occurred become less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens; random by default.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer; what the context holds by default.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with; one a core by default.")]
System = Annotated[str | None, typer.Option(help="A system message, for the chat template.")]
