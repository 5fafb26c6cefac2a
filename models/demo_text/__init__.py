"""The text on which the demo model is trained: generated, seeded, and free of any outside source."""

from demo_text.dialogue import evaluation, samples
from demo_text.shapes import Chat, Message, Plain, Question, Sample

__all__ = ["Chat", "Message", "Plain", "Question", "Sample", "evaluation", "samples"]
