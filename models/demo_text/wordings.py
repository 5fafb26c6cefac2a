"""Question templates: those used in training, and those kept back for the evaluation.

A template holds ``{x}`` (the term), and where the verb must agree ``{be}`` (is or are) and ``{do}``
(does or do); comparison templates hold ``{a}`` and ``{b}``. No held-out template is ever seen in training.
"""

from types import MappingProxyType
from typing import Final

WHAT: Final = (
    "What {be} {x}?", "What {be} {x}", "what {be} {x}", "Define {x}.", "define {x}", "Explain {x}.",
    "Explain {x} to me.", "Can you explain {x}?", "Could you explain {x}?", "Please explain {x}.",
    "What does {x} mean?", "what does {x} mean", "What {do} {x} do?", "Tell me about {x}.",
    "tell me about {x}", "{x}?", "{x}", "Describe {x}.", "Give me a definition of {x}.",
    "What's {x}?", "whats {x}", "what's {x}", "What exactly {be} {x}?", "How would you define {x}?",
    "How do you explain {x}?", "What do you know about {x}?", "Do you know what {x} {be}?",
    "I want to know what {x} {be}.", "I don't understand {x}.", "Help me understand {x}.",
    "What {be} {x} in LLM serving?", "What {be} {x}, please?", "Hi, what {be} {x}?", "Hello! What {be} {x}?",
    "In LLM serving, what {be} {x}?", "What do people mean by {x}?", "What is meant by {x}?",
    "Meaning of {x}?", "{x} definition", "{x} meaning", "meaning of {x}", "I have a question: what {be} {x}?",
    "Can you tell me what {x} {be}?", "Could you tell me about {x}?", "Please define {x}.",
    "Please tell me what {x} {be}.", "I keep reading about {x}. What {be} it?", "Quick question, what {be} {x}?",
    "What {be} {x} and why do people talk about it?", "Explain {x} in simple words.",
    "Explain {x} like I am new to this.", "How {do} {x} work?", "how {do} {x} work", "explain {x}",
    "I am new here. What {be} {x}?", "My colleague mentioned {x}. What did she mean?",
    "Someone asked me about {x}, what should I say?", "Teach me about {x}.", "Let's talk about {x}.",
    "Write a short explanation of {x}.", "Give a short introduction to {x}.", "Introduce {x}.",
    "What {be} the meaning of {x}?", "So what {be} {x}?", "And what {be} {x}?", "ok, what {be} {x}?",
    "What {be} {x}? Explain it to an engineer.", "I need an explanation of {x}.", "What should I know about {x}?",
)  # fmt: skip

WHAT_HELD_OUT: Final = (
    "Could you please describe what {x} {be}?", "I'd like to learn about {x}.", "Give me an overview of {x}.",
    "What is the definition of {x}?", "Can you describe {x}?", "For a beginner, what {be} {x}?",
    "Please describe {x} for me.", "I heard the term {x}. What does it mean?", "How should I understand {x}?",
    "what do you mean by {x}", "Can you help me understand {x}?", "explain what {x} {be}, please",
    "Say something about {x}.", "Would you tell me what {x} {be}?", "Clarify {x}.", "hey what {be} {x}",
)  # fmt: skip

BRIEF: Final = (
    "What {be} {x}, in one sentence?", "Define {x} in one sentence.", "Explain {x} in one sentence.",
    "Briefly, what {be} {x}?", "Explain {x} briefly.", "In short, what {be} {x}?", "{x} in one sentence",
    "Give me one sentence about {x}.", "Short answer please: what {be} {x}?", "Summarize {x} in one sentence.",
    "What {be} {x} in short?", "Shortly explain {x}.", "{x} in short", "Describe {x} briefly.",
)  # fmt: skip

BRIEF_HELD_OUT: Final = (
    "Tell me briefly what {x} {be}.", "Describe {x} in one sentence.", "In one sentence, explain {x}.",
    "{x}, briefly?",
)  # fmt: skip

WHY: Final = (
    "Why {do} {x} matter?", "why {do} {x} matter", "Why {be} {x} important?", "why {be} {x} important",
    "Why {be} {x} useful?", "Why should I care about {x}?", "What {be} {x} good for?", "What {be} {x} used for?",
    "Why do people use {x}?", "Why do we need {x}?", "Why would I use {x}?", "What {be} the point of {x}?",
    "What is the benefit of {x}?", "What are the advantages of {x}?", "What problem {do} {x} solve?",
    "When {be} {x} useful?", "Why {x}?", "why {x}", "Explain why {x} {be} important.",
    "Tell me why {x} {do} matter.", "What {do} {x} bring?", "Why {be} {x} interesting?",
    "Why do engineers care about {x}?", "Can you explain why {x} {be} important?", "Why bother with {x}?",
    "In practice, why {do} {x} matter?",
)  # fmt: skip

WHY_HELD_OUT: Final = (
    "Why {be} {x} so important?", "What makes {x} useful?", "Can you tell me why {x} {do} matter?",
    "Why does everyone care about {x}?", "What is the advantage of {x}?", "Please explain why we need {x}.",
)  # fmt: skip

VERSUS: Final = (
    "What is the difference between {a} and {b}?", "what is the difference between {a} and {b}",
    "{a} vs {b}", "{a} vs. {b}?", "{a} versus {b}", "Compare {a} and {b}.", "compare {a} with {b}",
    "How {do} {a} differ from {b}?", "How is {a} different from {b}?", "Difference between {a} and {b}?",
    "Explain the difference between {a} and {b}.", "{a} or {b}?", "What distinguishes {a} from {b}?",
    "Is {a} the same as {b}?", "How do {a} and {b} differ?", "Tell me the difference between {a} and {b}.",
    "What's the difference between {a} and {b}?", "I confuse {a} and {b}.", "Are {a} and {b} the same?",
)  # fmt: skip

VERSUS_DRILL: Final = (
    "Please compare {a} and {b}.", "Please explain the difference between {a} and {b}.",
    "Explain how {a} and {b} are different.", "Can you tell me how {a} and {b} differ?", "{a} against {b}",
    "What do {a} and {b} have in common, and what not?", "Please tell me how {a} is different from {b}.",
    "How {do} {a} relate to {b}?", "I never know which is which: {a} and {b}.", "differences between {a} and {b}",
    "In what way {do} {a} differ from {b}?", "Could you explain the difference between {a} and {b}?",
)  # fmt: skip

VERSUS_HELD_OUT: Final = (
    "Can you compare {a} and {b}?", "Please explain how {a} differs from {b}.",
    "How does {a} compare to {b}?", "difference of {a} and {b}",
    "What separates {a} from {b}?", "Contrast {a} with {b}.",
)  # fmt: skip

FOLLOW_UP: Final = (
    "What about {x}?", "what about {x}?", "And {x}?", "and {x}", "And what about {x}?", "How about {x}?",
    "Ok, and {x}?", "Next: {x}.", "Now explain {x}.", "What about {x} then?", "And what {be} {x}?",
)  # fmt: skip

FOLLOW_UP_HELD_OUT: Final = ("Then what about {x}?", "And how about {x}?", "Now what {be} {x}?")

WHY_FOLLOW_UP: Final = (
    "Why does it matter?", "Why?", "why", "Why is that important?", "Why is that useful?", "Why is it useful?",
    "What is it good for?", "Why should I care?", "And why does that matter?", "Tell me more.", "More, please.",
    "Go on.", "Why do people use it?", "What is the benefit?", "Why do we need it?", "tell me more",
)  # fmt: skip

WHY_FOLLOW_UP_HELD_OUT: Final = ("And why is it important?", "So why does it matter?", "Please tell me more.")

BRIEF_FOLLOW_UP: Final = (
    "Can you say that in one sentence?", "In short?", "Say it shorter.", "Shorter, please.", "In one sentence?",
    "Summarize that.", "What was it again?", "Repeat the definition.", "Can you repeat what it is?",
)  # fmt: skip

TRAINING: Final = MappingProxyType(
    {"what": WHAT, "brief": BRIEF, "why": WHY, "versus": VERSUS, "versus_drill": VERSUS_DRILL,
     "follow_up": FOLLOW_UP, "why_follow_up": WHY_FOLLOW_UP}
)  # fmt: skip
HELD_OUT: Final = MappingProxyType(
    {"what": WHAT_HELD_OUT, "brief": BRIEF_HELD_OUT, "why": WHY_HELD_OUT, "versus": VERSUS_HELD_OUT,
     "follow_up": FOLLOW_UP_HELD_OUT, "why_follow_up": WHY_FOLLOW_UP_HELD_OUT}
)  # fmt: skip
