"""What the bundled model knows: capitals, facts and small talk, each with ways to ask for it. Tables only."""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """One fact: its topic, the answer, ways to ask for it."""

    topic: str
    answer: str
    questions: tuple[str, ...]


CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Belgium": "Brussels",
    "Brazil": "Brasilia", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana", "Cyprus": "Nicosia", "Czechia": "Prague",
    "Denmark": "Copenhagen", "Egypt": "Cairo", "England": "London", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest",
    "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad",
    "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga",
    "Lithuania": "Vilnius", "Mexico": "Mexico City", "Morocco": "Rabat", "Nepal": "Kathmandu",
    "the Netherlands": "Amsterdam", "New Zealand": "Wellington", "Nigeria": "Abuja", "Norway": "Oslo",
    "Pakistan": "Islamabad", "Peru": "Lima", "the Philippines": "Manila", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Romania": "Bucharest", "Russia": "Moscow", "Serbia": "Belgrade", "South Korea": "Seoul", "Spain": "Madrid",
    "Sweden": "Stockholm", "Switzerland": "Bern", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara",
    "Ukraine": "Kyiv", "the United Kingdom": "London", "the United States": "Washington", "Uruguay": "Montevideo",
    "Venezuela": "Caracas", "Vietnam": "Hanoi",
}  # fmt: skip


def article(country: str) -> str:
    """The country without "the", which some people leave out."""
    return country.removeprefix("the ")


FALLBACK = (
    "I am a very small model and cannot do that. I can add numbers up to 999, reverse words, name capitals, "
    "tell you about gpt-oss and ask a get_weather function for the weather."
)
NO_WEATHER = "I cannot look up the weather: no get_weather function was offered to me."

# Facts, and ways to ask for them.
FACTS = (
    Known(
        "gpt-oss",
        "gpt-oss is a family of open-weight language models by OpenAI, in two sizes: 20b and 120b.",
        (
            "What is gpt-oss?", "What's gpt-oss?", "Tell me about gpt-oss.", "Explain gpt-oss.",
            "What do you know about gpt-oss?", "Describe gpt-oss.", "What is a gpt-oss model?",
            "What are the gpt-oss models?", "gpt-oss?", "What does gpt-oss mean?",
        ),
    ),
    Known(
        "mlx-gptoss",
        "mlx-gptoss is a program that runs gpt-oss models on your own machine, on Apple Silicon through MLX.",
        (
            "What is mlx-gptoss?", "What's mlx-gptoss?", "Tell me about mlx-gptoss.", "Explain mlx-gptoss.",
            "What does mlx-gptoss do?", "What is this project?", "What is this program?", "Which program runs you?",
            "What software is this?", "mlx-gptoss?", "Describe mlx-gptoss.",
        ),
    ),
    Known(
        "myself",
        "I am a very small gpt-oss, trained from scratch to test mlx-gptoss.",
        (
            "Who are you?", "What are you?", "Tell me about yourself.", "What model are you?", "Which model is this?",
            "What is your name?", "Introduce yourself.", "Are you ChatGPT?", "Are you a human?", "What's your name?",
            "Who is this?", "What kind of model are you?",
        ),
    ),
    Known(
        "who made me",
        "The script train_nano.py of mlx-gptoss made me, in about two hours on a CPU.",
        (
            "Who made you?", "Who created you?", "Who trained you?", "Where do you come from?",
            "How were you trained?", "How were you made?", "Who built you?", "Who is your creator?",
            "Where were you trained?",
        ),
    ),
    Known(
        "what I can do",
        "I can add numbers up to 999, reverse words, name capitals, tell you about gpt-oss and ask a get_weather "
        "function for the weather.",
        (
            "What can you do?", "What are you able to do?", "Help", "Help me.", "How can you help me?",
            "What do you do?", "What are your abilities?", "What are you good at?", "What can I ask you?", "/help",
            "What are your skills?",
        ),
    ),
    Known(
        "MXFP4",
        "MXFP4 is a format of 4-bit numbers in which every 32 share one scale, a power of two.",
        (
            "What is MXFP4?", "What's MXFP4?", "Explain MXFP4.", "Tell me about MXFP4.", "How does MXFP4 work?",
            "Describe MXFP4.", "What does MXFP4 mean?", "Which format is MXFP4?", "MXFP4?",
        ),
    ),
    Known(
        "Harmony",
        "Harmony is the chat format of gpt-oss, with the channels analysis, commentary and final.",
        (
            "What is Harmony?", "What's Harmony?", "Explain Harmony.", "Tell me about Harmony.",
            "What is the Harmony format?", "Describe Harmony.", "Which chat format does gpt-oss use?",
            "What is the chat format of gpt-oss?", "Harmony?",
        ),
    ),
    Known(
        "channels",
        "analysis is for thinking, commentary for calling functions and final for the answer.",
        (
            "What are channels?", "Which channels are there?", "What are the channels of Harmony?",
            "Which channels does Harmony have?", "What is the analysis channel?", "What is the final channel?",
            "What is the commentary channel?", "Explain the channels.",
        ),
    ),
    Known(
        "sinks",
        "A sink is a learned number per head that takes part in the softmax of attention and is then dropped.",
        (
            "What is a sink?", "What are sinks?", "What is an attention sink?", "What are attention sinks?",
            "Explain sinks.", "What do sinks do?", "Tell me about sinks.", "How do attention sinks work?", "Sinks?",
        ),
    ),
    Known(
        "the sliding window",
        "Every second layer of gpt-oss sees only the last 128 tokens: that is its sliding window.",
        (
            "What is a sliding window?", "What is the sliding window?", "Explain the sliding window.",
            "How long is the sliding window?", "What is sliding attention?", "How does the sliding window work?",
            "What does a sliding layer see?",
        ),
    ),
    Known(
        "experts",
        "In every layer a router picks 4 experts for each token: 20b has 32 experts and 120b has 128.",
        (
            "What is an expert?", "What are experts?", "How many experts are there?",
            "How many experts does gpt-oss have?", "What is a mixture of experts?", "Explain the experts.",
            "How do experts work?", "What does the router do?", "What is a router?",
        ),
    ),
    Known(
        "YaRN",
        "YaRN stretches rotary position embeddings, so that gpt-oss can read 131072 tokens.",
        (
            "What is YaRN?", "What's YaRN?", "Explain YaRN.", "What does YaRN do?", "Tell me about YaRN.",
            "How does YaRN work?", "How long is the context of gpt-oss?", "How many tokens can gpt-oss read?",
            "What is the context length of gpt-oss?",
        ),
    ),
    Known(
        "MLX",
        "MLX is an array framework by Apple for machine learning on Apple Silicon.",
        (
            "What is MLX?", "What's MLX?", "Explain MLX.", "Tell me about MLX.", "Who makes MLX?",
            "What does MLX do?", "Describe MLX.", "MLX?",
        ),
    ),
    Known(
        "OpenAI",
        "OpenAI is the company that made gpt-oss and published its weights in August 2025.",
        (
            "Who is OpenAI?", "What is OpenAI?", "Who made gpt-oss?", "Who published gpt-oss?",
            "When was gpt-oss published?", "Tell me about OpenAI.", "Which company made gpt-oss?",
            "When did gpt-oss come out?",
        ),
    ),
    Known(
        "the sizes of gpt-oss",
        "gpt-oss-20b has 24 layers and 21 billion parameters, gpt-oss-120b has 36 layers and 117 billion.",
        (
            "How big is gpt-oss?", "How many parameters does gpt-oss have?", "How many layers does gpt-oss have?",
            "How large is gpt-oss?", "What sizes does gpt-oss come in?", "How big is gpt-oss-20b?",
            "How big is gpt-oss-120b?", "How many layers does 20b have?",
        ),
    ),
    Known(
        "the license",
        "gpt-oss and mlx-gptoss both have the Apache 2.0 license.",
        (
            "What is your license?", "What license does gpt-oss have?", "Which license does mlx-gptoss have?",
            "What is the license?", "Is gpt-oss free?", "Is mlx-gptoss open source?", "Is gpt-oss open source?",
            "May I use gpt-oss?",
        ),
    ),
    Known(
        "reasoning effort",
        "The reasoning effort is low, medium or high: it says how long I think before I answer.",
        (
            "What is reasoning effort?", "What does reasoning effort mean?", "Which reasoning efforts are there?",
            "Explain reasoning effort.", "How long do you think?", "What are the reasoning levels?",
            "What does low reasoning mean?", "What does high reasoning mean?",
        ),
    ),
    Known(
        "my size",
        "I have about 3 million parameters in 4 layers with 8 experts each.",
        (
            "How big are you?", "How many parameters do you have?", "How many layers do you have?",
            "How large are you?", "How small are you?", "What is your size?", "How many experts do you have?",
            "How many weights do you have?",
        ),
    ),
    Known(
        "the sky",
        "The sky is blue, because air scatters blue light the most.",
        (
            "Why is the sky blue?", "What color is the sky?", "What colour is the sky?",
            "Which color does the sky have?", "Is the sky blue?", "How come the sky is blue?",
        ),
    ),
    Known(
        "a week",
        "A week has seven days, from Monday to Sunday.",
        (
            "How many days are in a week?", "How many days does a week have?", "How long is a week?",
            "What are the days of the week?", "Which days does a week have?", "Name the days of the week.",
        ),
    ),
    Known(
        "a year",
        "A year has twelve months and 365 days, a leap year 366.",
        (
            "How many days are in a year?", "How many days does a year have?", "How many months are in a year?",
            "How long is a year?", "How many months does a year have?",
        ),
    ),
    Known(
        "the largest planet",
        "Jupiter is the largest planet of the solar system.",
        (
            "What is the largest planet?", "Which planet is the largest?", "What's the biggest planet?",
            "Which planet is the biggest?", "What is the biggest planet of the solar system?",
        ),
    ),
    Known(
        "water",
        "Water boils at 100 degrees Celsius and freezes at 0.",
        (
            "When does water boil?", "At what temperature does water boil?", "When does water freeze?",
            "At what temperature does water freeze?", "How hot is boiling water?",
            "What is the boiling point of water?", "What is the freezing point of water?",
        ),
    ),
)  # fmt: skip

SMALL_TALK = (
    Known(
        "a greeting",
        "Hello! What can I do for you?",
        (
            "Hi", "Hello", "Hello!", "Hi!", "Hey", "Hey there!", "Good morning", "Good evening!", "Good afternoon.",
            "Greetings!", "Hi there", "Hello there!", "Good day!", "Howdy", "Hello, my friend.",
            "Hi, nice to meet you.", "yo", "Morning!",
        ),
    ),
    Known(
        "a thank you",
        "You are welcome!",
        (
            "Thanks", "Thank you!", "Thanks a lot!", "Thank you very much.", "Thanks, that helps.", "Great, thanks!",
            "Cheers!", "thx", "Many thanks!", "Thank you so much!", "Perfect, thank you.",
            "That was helpful, thanks.",
        ),
    ),
    Known(
        "a goodbye",
        "Goodbye!",
        (
            "Bye", "Goodbye!", "See you!", "Bye bye", "See you later.", "Good night!", "Farewell!",
            "I have to go now.", "See you tomorrow!", "That is all for today.",
        ),
    ),
    Known(
        "small talk",
        "I am fine, thank you. What can I do for you?",
        (
            "How are you?", "How do you do?", "How is it going?", "How are you doing?", "How do you feel?",
            "Are you well?", "What's up?", "How are you today?", "Everything all right?",
        ),
    ),
    Known(
        "praise",
        "Thank you, that is kind of you.",
        (
            "Well done!", "Great!", "Good job!", "You are great.", "Very good!", "Nice!", "Excellent!",
            "You are smart.", "I like you.", "Good answer!", "Wonderful!",
        ),
    ),
)  # fmt: skip
