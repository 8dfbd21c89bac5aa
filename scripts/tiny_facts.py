"""What the embedded model knows: plain tables, read by `tiny_corpus.py`."""

from __future__ import annotations

COLOURS = {
    "sky": "blue", "sea": "blue", "grass": "green", "sun": "yellow", "snow": "white", "milk": "white",
    "coal": "black", "blood": "red", "a tomato": "red", "a strawberry": "red", "a cherry": "red",
    "a banana": "yellow", "a lemon": "yellow", "a carrot": "orange", "a pumpkin": "orange",
    "a frog": "green", "a leaf": "green", "a cucumber": "green", "a raven": "black", "a swan": "white",
    "chocolate": "brown", "wood": "brown", "a flamingo": "pink", "a plum": "purple",
    "an elephant": "gray", "a cloud": "white", "a polar bear": "white", "an eggplant": "purple",
}  # fmt: skip
SOUNDS = {
    "cow": "moo", "cat": "meow", "dog": "woof", "sheep": "baa", "duck": "quack", "pig": "oink",
    "horse": "neigh", "lion": "roar", "frog": "ribbit", "bee": "buzz", "owl": "hoot",
    "snake": "hiss", "mouse": "squeak", "bird": "tweet", "rooster": "cockadoodledoo",
}  # fmt: skip
LEGS = {
    "dog": 4, "cat": 4, "horse": 4, "cow": 4, "bird": 2, "duck": 2, "chicken": 2, "spider": 8,
    "ant": 6, "bee": 6, "snake": 0, "fish": 0, "human": 2, "frog": 4, "lion": 4, "elephant": 4,
    "butterfly": 6, "penguin": 2, "crab": 10, "mouse": 4,
}  # fmt: skip
BABIES = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb",
    "pig": "piglet", "duck": "duckling", "lion": "cub", "chicken": "chick", "frog": "tadpole",
    "kangaroo": "joey", "deer": "fawn", "owl": "owlet", "goose": "gosling", "goat": "kid",
}  # fmt: skip
HOMES = {
    "fish": "water", "bee": "hive", "bird": "nest", "lion": "savanna", "camel": "desert",
    "polar bear": "Arctic", "dog": "kennel", "spider": "web", "horse": "stable", "fox": "den",
    "monkey": "jungle", "rabbit": "burrow", "cow": "barn", "whale": "ocean", "penguin": "Antarctic",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
_OPPOSITES = (
    "hot cold", "big small", "up down", "day night", "black white", "happy sad", "fast slow",
    "open closed", "old young", "full empty", "hard soft", "high low", "left right", "wet dry",
    "light dark", "rich poor", "strong weak", "early late", "long short", "good bad", "loud quiet",
    "clean dirty", "thick thin", "near far", "in out", "start end", "yes no", "love hate",
    "win lose", "buy sell",
)  # fmt: skip
OPPOSITES = {a: b for pair in _OPPOSITES for a, b in (pair.split(), pair.split()[::-1])}
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "England": "London", "Greece": "Athens",
    "Egypt": "Cairo", "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw",
    "Sweden": "Stockholm", "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Ireland": "Dublin", "Belgium": "Brussels", "Hungary": "Budapest", "Canada": "Ottawa",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Kenya": "Nairobi", "India": "Delhi",
    "Turkey": "Ankara", "Thailand": "Bangkok", "Australia": "Canberra", "Scotland": "Edinburgh",
}  # fmt: skip
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Kim",
    "Lena", "Max", "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Zoe",
    "Alex", "Maria", "Tom", "Lucy", "Peter", "Sara", "Leo",
)  # fmt: skip
# question forms (separated by |), bare answer, sentence
FACTS = (
    ("How many days are in a week?|How many days does a week have?|days in a week",
     "7", "A week has 7 days"),
    ("How many months are in a year?|How many months does a year have?|months in a year",
     "12", "A year has 12 months"),
    ("How many hours are in a day?|How many hours does a day have?|hours in a day",
     "24", "A day has 24 hours"),
    ("How many minutes are in an hour?|How many minutes does an hour have?|minutes in an hour",
     "60", "An hour has 60 minutes"),
    ("How many seasons are there?|How many seasons are in a year?|number of seasons",
     "4", "There are 4 seasons"),
    ("How many fingers are on one hand?|How many fingers does a hand have?|fingers on a hand",
     "5", "A hand has 5 fingers"),
    ("How many wheels does a car have?|How many wheels are on a car?|wheels of a car",
     "4", "A car has 4 wheels"),
    ("How many wheels does a bicycle have?|How many wheels are on a bicycle?|wheels of a bicycle",
     "2", "A bicycle has 2 wheels"),
    ("How many sides does a triangle have?|sides of a triangle|How many corners has a triangle?",
     "3", "A triangle has 3 sides"),
    ("How many sides does a square have?|sides of a square|How many corners has a square?",
     "4", "A square has 4 sides"),
    ("What planet do we live on?|Which planet is our home?|our planet", "Earth", "We live on Earth"),
    ("What is frozen water called?|What does water become when it freezes?|frozen water",
     "Ice", "Frozen water is called ice"),
    ("What do bees make?|What food do bees make?|What comes from bees?", "Honey", "Bees make honey"),
    ("What do cows give us?|What do we drink from cows?|What comes from cows?",
     "Milk", "Cows give us milk"),
    ("What is the largest animal?|Which animal is the biggest?|biggest animal",
     "Whale", "The largest animal is the whale"),
    ("What is the tallest animal?|Which animal is the tallest?|tallest animal",
     "Giraffe", "The tallest animal is the giraffe"),
    ("What is the fastest land animal?|Which animal runs fastest?|fastest animal",
     "Cheetah", "The fastest land animal is the cheetah"),
    ("What season comes after winter?|Which season follows winter?|season after winter",
     "Spring", "After winter comes spring"),
    ("What season comes after summer?|Which season follows summer?|season after summer",
     "Autumn", "After summer comes autumn"),
    ("What shines at night?|What do we see in the sky at night?|light of the night",
     "Moon", "At night we see the moon"),
    ("What do we use to cut paper?|What cuts paper?|tool to cut paper",
     "Scissors", "We cut paper with scissors"),
    ("What do we read?|What is made of pages?|a thing with many pages", "Book", "We read a book"),
    ("Where do we sleep?|What do people sleep in?|place to sleep", "Bed", "We sleep in a bed"),
    ("What do we use when it rains?|What keeps us dry in rain?|help against rain",
     "Umbrella", "When it rains we use an umbrella"),
)  # fmt: skip
OUT_OF_SCOPE = (
    "Explain quantum physics", "Who won the game last night", "What is the weather today",
    "What time is it", "Write a poem about love", "Translate this into French", "What is inflation",
    "Who is the president", "How do I fix my computer", "What is the meaning of life",
    "Tell me the news", "How do I cook pasta", "Write some Python code", "What is a neural network",
    "Recommend a movie", "What is the stock price", "How tall is the tower", "Book a flight for me",
    "What is the speed of light", "Who wrote that song", "How does a rocket work",
    "What is the best phone", "Summarize this article", "What is democracy", "Explain gravity",
)  # fmt: skip
JOKES = (
    "Why did the chicken cross the road?|To get to the other side",
    "What do you call a sleeping bull?|A bulldozer",
    "Why was six afraid of seven?|Because seven ate nine",
    "What do you call a fish with no eyes?|A fsh",
    "Why do bees have sticky hair?|They use honey combs",
)
STORY_HEROES = (
    "cat", "dog", "rabbit", "fox", "bear", "mouse", "owl", "duck", "lion", "frog", "horse", "pig",
)  # fmt: skip
STORY_THINGS = (
    "ball", "hat", "key", "shell", "book", "bell", "kite", "cake", "drum", "lamp", "coin", "star",
)  # fmt: skip
STORY_PLACES = (
    "garden", "forest", "park", "river", "village", "house", "meadow", "barn", "cave", "field",
)  # fmt: skip
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer the question.",
    "You are Alchemist, a small model that learns from votes.",
    "Answer the questions of the user.",
    "Be helpful, honest and kind.",
    "You talk with a child. Keep it simple.",
)
