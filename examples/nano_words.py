"""The words the nano model's conversations are made of: tables only."""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """Something to know: what it is about, the answer, ways to ask for it."""

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
    """The country without "the": some people leave it out."""
    return country.removeprefix("the ")


FALLBACK = (
    "I am a very small model and cannot do that. I can add numbers up to 999, reverse words, name capitals, "
    "tell you about gpt-oss and ask a get_weather function for the weather."
)
NO_WEATHER = "I cannot look up the weather: no get_weather function was offered to me."

# What the model knows, and how it may be asked.
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

PREFIXES = (
    "Please: ", "Hi! ", "Hello, ", "Tell me: ", "A question: ", "Next question: ", "Hey, ", "Quick question: ",
    "Please tell me: ",
)  # fmt: skip

# Sums and words backwards; {a} and {b} are numbers.
SUMS = (
    "What is {a} + {b}?", "What is {a} + {b}?", "What's {a} + {b}?", "What is {a} plus {b}?", "What's {a} plus {b}?",
    "{a}+{b}", "{a} + {b}", "{a} + {b} = ?", "{a}+{b}=", "{a} plus {b}", "Add {a} and {b}.", "Add {a} to {b}.",
    "Add {a} + {b}.", "Compute {a} + {b}.", "Calculate {a} + {b}.", "Sum {a} and {b}.", "How much is {a} + {b}?",
    "How much is {a} plus {b}?", "What is the sum of {a} and {b}?", "Find the sum of {a} and {b}.",
    "Work out {a} + {b}.", "What do you get if you add {a} and {b}?", "Can you add {a} and {b}?",
    "I have {a} apples and get {b} more. How many apples do I have?", "What does {a} + {b} make?",
    "{a} and {b} together?", "What is {a}+{b}?", "Tell me {a} + {b}.", "Solve {a} + {b}.",
    "Give me the sum of {a} and {b}.", "What are {a} and {b} together?",
)  # fmt: skip
ADD_TO_THAT = (
    "Add {b} to that.", "Add {b}.", "Now add {b}.", "Plus {b}?", "plus {b}", "+ {b}", "And {b} more?",
    "Add another {b}.", "And plus {b}?", "What if you add {b}?", "Now add {b} to it.", "Add {b} to the result.",
    "And {b} more on top?", "What is that plus {b}?", "+{b}",
)  # fmt: skip
REVERSALS = (
    "Reverse the word {word}.", "Reverse the word {word}.", 'Reverse the word "{word}".', "Spell {word} backwards.",
    "Reverse {word}.", "Reverse {word}", "Spell the word {word} backwards.", "What is {word} backwards?",
    "What's {word} spelled backwards?", "{word} backwards", "Write {word} backwards.", "Write {word} in reverse.",
    "Can you reverse {word}?", "How do you spell {word} backwards?", "Reverse: {word}", 'What is "{word}" reversed?',
    "Please reverse {word}.", "Please spell {word} backwards.", "Turn {word} around.", "{word} reversed?",
    "Reverse the letters of {word}.", "Give me {word} backwards.", "reverse the word {word}", "reverse {word}",
    "spell {word} backwards", "Say {word} backwards.", "What does {word} look like backwards?",
    "Reverse the string {word}.", "Could you spell {word} backwards?",
)  # fmt: skip
REVERSE_THAT = (
    "And reversed?", "Reverse that.", "And backwards?", "Now reverse it.", "Spell that backwards.", "Reverse it.",
    "Now backwards.", "Reverse the answer.", "What is that backwards?", "and reversed", "Now spell it backwards.",
    "Can you reverse that?", "reverse that",
)  # fmt: skip
AND_THE_WORD = (
    "And {word}?", "And the word {word}?", "Now {word}.", "What about {word}?", "Now the word {word}.",
    "Do the same with {word}.", "And now {word}?", "The same for {word}.", "Now do {word}.", "How about {word}?",
    "and {word}",
)  # fmt: skip

# Capitals; {country} has its article, {the} has not.
CAPITAL_QUESTIONS = (
    "What is the capital of {country}?", "What's the capital of {country}?", "What is the capital city of {country}?",
    "Which city is the capital of {country}?", "Tell me the capital of {country}.", "Name the capital of {country}.",
    "The capital of {country}?", "Capital of {country}?", "capital of {the}", "What is {the}'s capital?",
    "{the}'s capital?", "What city is the capital of {country}?", "Do you know the capital of {country}?",
    "Give me the capital of {country}.", "Which is the capital of {country}?", "What is the capital of {the}?",
    "The capital of {country} is", "{country}: capital?", "I need the capital of {country}.",
    "Can you tell me the capital of {country}?", "How is the capital of {country} called?",
)  # fmt: skip
AND_OF = (
    "And of {country}?", "What about {country}?", "And {country}?", "How about {country}?",
    "And the capital of {country}?", "And {the}?", "Now {country}.", "And for {country}?", "The same for {country}.",
    "And what about {country}?", "Which is it for {country}?",
)  # fmt: skip

# The weather.
WEATHER_QUESTIONS = (
    "What is the weather in {city}?", "What is the weather in {city}?", "What's the weather in {city}?",
    "How is the weather in {city}?", "What is the weather like in {city}?",
    "What's the weather like in {city} today?", "Weather in {city}?", "weather in {city}",
    "How's the weather in {city}?", "Tell me the weather in {city}.", "What is the temperature in {city}?",
    "How warm is it in {city}?", "How cold is it in {city} now?", "Is it raining in {city}?",
    "Is it sunny in {city}?", "Do I need an umbrella in {city}?", "What's the temperature in {city} right now?",
    "Get the weather for {city}.", "Check the weather in {city}.", "{city} weather",
    "Can you check the weather in {city}?", "What will the weather be in {city}?", "Will it rain in {city} tomorrow?",
    "Weather for {city}", "I am in {city}. What is the weather?", "I travel to {city}. How is the weather there?",
    "How hot is it in {city}?", "What is the weather in {city} today?", "What's the current weather in {city}?",
    "Is it cold in {city}?", "Does it snow in {city}?",
)  # fmt: skip
AND_IN = (
    "And in {city}?", "What about {city}?", "And {city}?", "How about {city}?", "And the weather in {city}?",
    "Now {city}.", "And for {city}?", "The same for {city}.", "and in {city}",
)  # fmt: skip
FUNCTION_DESCRIPTIONS = (
    "Get the weather.", "Get the current weather.", "Gets the weather for a location.",
    "Gets the current weather in the provided location.", "Get the current weather in a given location",
    "Returns the weather of a city.", "Current weather of a place.", "Weather lookup.",
    "Get current temperature for a given location.", "Looks up the weather in a city.",
    "The weather at a location, now.", "Get weather", "Fetch the weather forecast for a city.",
    "Use this to find out the weather.", "Reports temperature and condition.",
)  # fmt: skip
PARAMETER_DESCRIPTIONS = (
    "City name", "The city and state, e.g. San Francisco, CA", "The name of the city.", "City", "The location",
    "Where?", "City and country e.g. Bogota, Colombia", "The place to look up", "Name of a city",
    "The city to get the weather for.",
)  # fmt: skip
SKIES = (
    "sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy", "partly cloudy", "overcast", "hazy",
    "dry", "light rain", "heavy rain", "humid", "icy", "showers", "mostly sunny", "thunderstorms", "drizzle",
)  # fmt: skip
SKY_KEYS = (
    "condition", "condition", "conditions", "weather", "description", "sky",
)  # fmt: skip
MORE_CITIES = """
    Aachen, Aarhus, Aberdeen, Adelaide, Alexandria, Algiers, Almaty, Antwerp, Atlanta, Auckland, Austin, Baku,
    Baltimore, Barcelona, Bari, Basel, Beirut, Belfast, Bergen, Bilbao, Birmingham, Bologna, Bordeaux, Boston,
    Bremen, Brisbane, Bristol, Bruges, Busan, Calgary, Cape Town, Cardiff, Casablanca, Charlotte, Chennai,
    Chicago, Cincinnati, Cleveland, Cologne, Columbus, Cordoba, Dakar, Dallas, Damascus, Delhi, Denver, Detroit,
    Dhaka, Doha, Dortmund, Dresden, Dubai, Durban, Edinburgh, Florence, Frankfurt, Fukuoka, Galway, Gdansk,
    Geneva, Genoa, Ghent, Glasgow, Gothenburg, Granada, Graz, Haifa, Halifax, Hamburg, Hannover, Hiroshima,
    Hobart, Hong Kong, Honolulu, Houston, Innsbruck, Istanbul, Izmir, Jaipur, Jerusalem, Johannesburg, Kampala,
    Karachi, Kobe, Kolkata, Krakow, Kyoto, Lagos, Lahore, Las Vegas, Leeds, Leipzig, Lille, Linz, Liverpool, Los
    Angeles, Lyon, Malaga, Malmo, Manchester, Marseille, Medellin, Melbourne, Memphis, Miami, Milan, Minsk,
    Montreal, Mumbai, Munich, Nagoya, Nantes, Naples, Nashville, New York, Nice, Nuremberg, Oakland, Odesa,
    Orlando, Osaka, Oxford, Palermo, Perth, Philadelphia, Phoenix, Pisa, Pittsburgh, Portland, Porto, Quebec,
    Quito, Rotterdam, Sacramento, Salzburg, San Diego, San Francisco, San Jose, Sao Paulo, Sapporo, Seattle,
    Seville, Shanghai, Shenzhen, Singapore, Split, Stuttgart, Sydney, Taipei, Tampa, Tashkent, Tbilisi, Toronto,
    Toulouse, Trieste, Trondheim, Turin, Utrecht, Valencia, Vancouver, Venice, Verona, Winnipeg, Yokohama, York,
    Zurich
"""
CITIES = tuple(sorted({*CAPITALS.values(), *(" ".join(city.split()) for city in MORE_CITIES.split(","))}))

INSTRUCTIONS = (
    "You are a helpful assistant.", "Answer briefly.", "Be brief.", "Be kind.", "You are a helpful AI.",
    "You are a friendly assistant. Keep your answers short.", "Answer in English.",
    "You are an assistant on a web page.", "Use the functions when you need them.",
    "You are a careful assistant who thinks step by step.", "Do not guess.", "Be precise.", "Always answer politely.",
    "You are a concise assistant.", "Never use emojis.", "You are a weather bot.", "Talk like a teacher.",
    "You help people with their homework.", "Only answer what was asked.",
    "Answer the user's questions as well as you can.",
)  # fmt: skip

# Words to reverse, and what made-up words are made of.
COMMON = tuple(
    """
    apple banana cat dog house planet river stone table window garden flower yellow orange purple silver golden
    winter summer spring autumn monday friday sunday music dance light night morning evening forest mountain
    valley island ocean water fire earth wind cloud rain snow bread butter cheese sugar coffee bottle spoon
    knife plate kitchen bedroom school teacher student paper pencil book letter number word computer keyboard
    screen mouse python swift rust metal kernel tensor vector matrix model token layer expert attention router
    sink harmony hello world friend mother father sister brother family horse tiger lion rabbit monkey elephant
    eagle parrot dolphin salmon spider racecar level noon radar doctor lawyer farmer soldier artist singer
    writer engine rocket train bicycle airplane bridge street village city country happy angry quick brown lazy
    strong weak bright dark clean dirty empty full heavy simple strange little great small open stressed
    desserts
    """.split()  # noqa: SIM905
)
ONSETS = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "cr", "dr", "fl",
    "gr", "pl", "st", "th", "tr", "",
)  # fmt: skip
CODAS = (
    "", "", "", "n", "r", "s", "t", "l", "m", "nd", "st", "ck", "rt", "ng",
)  # fmt: skip

# What the model cannot do.
NAMES = (
    "Einstein", "Mozart", "Anna", "Napoleon", "Shakespeare", "Newton", "Cleopatra", "Peter", "Maria", "Darwin",
    "Bach", "Tesla", "Goethe", "Beethoven", "Curie", "Gandhi", "Caesar", "Plato", "Picasso", "Lincoln",
)  # fmt: skip
NOUNS = (
    "love", "a cake", "history", "the moon", "a dragon", "my cat", "pizza", "football", "physics", "chess", "the sea",
    "gravity", "a car", "money", "an atom", "the war", "python", "my job", "dinner", "philosophy", "art", "the sun",
    "a song", "music", "a horse", "evolution", "time", "a black hole", "a recipe", "the stock market", "a joke",
    "cancer", "the internet", "a computer", "democracy", "happiness",
)  # fmt: skip
OTHER_QUESTIONS = (
    "What is {noun}?", "Who is {name}?", "Explain {noun}.", "Write a poem about {noun}.",
    "Write a story about {noun} and {other}.", "How do I make {noun}?", "Why is {noun} so popular?",
    "Tell me a joke.", "Tell me a joke about {noun}.", "What do you think about {noun}?",
    "Translate {noun} to French.", "Who invented {noun}?", "When was {name} born?", "Where did {name} live?",
    "Is {noun} better than {other}?", "What is {a} - {b}?", "What is {a} * {b}?", "What is {a} times {b}?",
    "Divide {a} by {b}.", "What is {a} minus {b}?", "{a}*{b}", "{a} / {b}", "{a}-{b}", "Subtract {a} from {b}.",
    "How many people live in {country}?", "What language do they speak in {country}?", "Sing a song.",
    "What is the population of {country}?", "Where is {country}?", "Who is the president of {country}?",
    "What time is it?", "What day is it?", "Do you like {noun}?", "Give me a recipe for {noun}.",
    "How old is {name}?", "What did {name} do?", "Compare {noun} and {other}.", "Summarize {noun}.", "Draw {noun}.",
    "Can you write code for {noun}?", "Write a function that sorts a list.", "I feel sad about {noun}.",
    "What is the meaning of life?", "Recommend a book about {noun}.", "What is the best movie?",
    "How far is the moon?", "Play {noun}.", "My name is {name}.", "Remember that I like {noun}.",
    "How much does {noun} cost?", "Where can I buy {noun}?", "Once upon a time",
    "The quick brown fox jumps over the lazy dog.", "Explain the difference between {noun} and {other}.",
    "Is {name} famous?", "I want {noun}.", "Why did {name} like {noun}?", "Does {name} know {noun}?", "Count to {b}.",
    "What is the square root of {a}?", "Is {a} a prime number?", "How do I learn {noun}?", "What are the news?",
    "Write an email to {name}.", "Fix my code.", "What happened in {a}?", "List ten animals.",
)  # fmt: skip
ODD_PROMPTS = (
    "?", "...", "a", "hm", "ok", "yes", "no", "test", "foo", "asdf", "!", "why", "because", "what", "lol", ".", "1",
    "42", "x", "and?", "so?", "Really?", "Say something.", "Anything.", "I don't know.", "Maybe", "blah blah", "()",
    "{}", "#", "null",
)  # fmt: skip
