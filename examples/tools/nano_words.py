"""What the bundled model's conversations are made of: ways to ask, names, words to reverse. Tables only."""

from __future__ import annotations

from nano_facts import CAPITALS

# What may come before a question.
PREFIXES = (
    "Please: ", "Hi! ", "Hello, ", "Tell me: ", "A question: ", "Next question: ", "Hey, ", "Quick question: ",
    "Please tell me: ",
)  # fmt: skip

# How a question asks for JSON.
IN_JSON = (
    " Answer in JSON.", " Reply in JSON.", " Answer with JSON only.", " Give me JSON.", " Return JSON.", " Use JSON.",
    " Answer as a JSON object.", " (JSON)", " in JSON", " as JSON", " JSON please.",
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
