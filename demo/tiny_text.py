"""The text that the tiny demo model learns: questions with the one answer that counts as right.

Nothing is collected; everything is made here from a few tables of phrasings. What is held out from
training is decided here too: a fifth of the pairs of summands and of the counting ranges (in either
order and every phrasing), and the last entry of every list of phrasings and of topics.
"""

import random
import zlib
from typing import NamedTuple


def split(text: str) -> list[str]:
    """A table of phrasings or words, written as one string."""
    return text.split("|")


WHO_EN = (
    "I am a tiny demo model of nanovllm, with about one million parameters. "
    "For real answers, please name a real model, such as Qwen/Qwen3-0.6B."
)
CAN_EN = (
    "I can count, list the primes under 100 and add two-digit numbers, in English and Chinese. "
    "For anything else, please name a real model."
)
OTHER_EN = (
    "Sorry, I am only a tiny demo model and do not know that. I can count, list primes and add "
    "two-digit numbers. For real answers, please name a real model."
)
WHO_ZH = (
    "我是 nanovllm 的微型演示模型，大约有一百万个参数。"
    "想要真正的回答，请指定一个真正的模型，例如 Qwen/Qwen3-0.6B。"
)
CAN_ZH = (
    "我会数数、列出100以内的质数，还会做两位数加法，中文英文都可以。其他问题请指定一个真正的模型。"
)
OTHER_ZH = (
    "抱歉，我只是一个微型演示模型，不知道答案。我会数数、列出质数和做两位数加法。"
    "想要真正的回答，请指定一个真正的模型。"
)
SUMS = split(
    "What is {a} + {b}?|{a} + {b} =|{a}+{b}=|{a}+{b}|{a} + {b}|{a} + {b} = ?|What's {a}+{b}?|"
    "What is {a} plus {b}?|Add {a} and {b}.|Calculate {a} + {b}.|What is the sum of {a} and {b}?|"
    "How much is {a} + {b}?|{a} plus {b}|{a}加{b}等于多少？|{a}+{b}等于多少？|"
    "{a} + {b} 等于多少？|{a}加{b}是多少？|{a}+{b}=?|计算{a}+{b}|请计算 {a} + {b}。|"
    "{a}加{b}等于几？|{a}与{b}的和是多少？|And {a} + {b}?|And {a}+{b}?|那{a}+{b}呢？|"
    "How much is {a} plus {b}?"
)
COUNTS = split(
    "Count from {a} to {b}.|Count {a} to {b}.|Please count from {a} to {b}.|"
    "Can you count from {a} to {b}?|List the numbers from {a} to {b}.|从{a}数到{b}。|"
    "请从{a}数到{b}。|从 {a} 数到 {b}|请你从{a}数到{b}|数数，从{a}到{b}。|"
    "Could you count from {a} to {b}?"
)
COUNTS_FROM_ONE = split("Count to {b}.|Count up to {b}.|数到{b}。|请数到{b}。|Please count to {b}.")
COUNTS_DOWN = split(
    "Count down from {a} to {b}.|Count backwards from {a} to {b}.|从{a}倒数到{b}。|"
    "请从{a}倒数到{b}。|Please count down from {a} to {b}."
)
PRIMES = split(
    "List the primes under {n}.|List all primes below {n}.|What are the primes under {n}?|"
    "List the prime numbers under {n}.|Which primes are less than {n}?|Primes under {n}|"
    "Name the prime numbers below {n}.|What are the prime numbers less than {n}?|"
    "列出{n}以内的质数。|{n}以内的质数有哪些？|{n}以下的素数有哪些？|请列出{n}以内的所有质数。|"
    "小于{n}的质数有哪些？|{n}以内的素数|Show me the primes below {n}."
)
EN_NUMBERS = split(
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    "fifteen|sixteen|seventeen|eighteen|nineteen|twenty"
)
ZH_NUMBERS = split(
    "零|一|二|三|四|五|六|七|八|九|十|十一|十二|十三|十四|十五|十六|十七|十八|十九|二十"
)
OTHER_QUESTIONS_EN = split(
    "What is the capital of {x}?|Write a poem about {x}.|Tell me a joke about {x}.|What is {x}?|"
    "Who is {x}?|Explain {x} to me.|How does {x} work?|Where is {x}?|Translate {x} into French.|"
    "Why is {x} so popular?|Tell me about {x}.|Who invented {x}?|What is the meaning of {x}?|"
    "Write a story about {x}.|How do I make {x}?|{x}|What do you think about {x}?|"
    "When did {x} begin?|Give me three facts about {x}.|Is {x} good or bad?|Summarize {x}.|"
    "Write a Python program for {x}.|Do you like {x}?|What is the weather in {x}?|"
    "Can you explain {x}?|How old is {x}?|What is the best {x}?|Describe {x} in one sentence.|"
    "Show me {x}.|How many {x} are there?|List some {x}.|What is {a} - {b}?|"
    "What is {a} times {b}?|{a} * {b}|{a} / {b}|{a} - {b} =|What is {c} + {d}?|{c}+{d}=|"
    "What is {a} minus {b}?|{c} + {d}|"
    "What is {c} plus {d}?|What is {c}+{a}?|{a}+{c}=|{a}|{c}"
)
OTHER_QUESTIONS_ZH = split(
    "{x}的首都是哪里？|写一首关于{x}的诗。|什么是{x}？|请解释一下{x}。|{x}在哪里？|{x}是谁？|"
    "讲一个关于{x}的故事。|为什么{x}很有名？|怎么做{x}？|谁发明了{x}？|你喜欢{x}吗？|{x}|"
    "{x}的天气怎么样？|给我讲讲{x}。|把{x}翻译成英文。|{x}有什么意思？|{a}减{b}等于多少？|"
    "{a}乘以{b}等于多少？|{c}加{d}等于多少？|{c}+{a}等于多少？"
)
TOPICS_EN = split(
    "France|Germany|Japan|the moon|the sun|gravity|love|music|football|coffee|bread|history|Paris|"
    "London|Einstein|Shakespeare|the internet|a computer|cats|dogs|birds|the sea|quantum physics|"
    "money|the weather|a car|life|time|space|books|a KV cache|attention|machine learning|tea|"
    "chess|rice|the sky|trees|a robot|school|art|water|fire|dinosaurs|Python|Rust|the economy|"
    "large language models|China|India|Brazil|Rome|a sorting algorithm|a dragon|winter|summer|"
    "the ocean|a neural network|me|a unicorn"
)
TOPICS_ZH = split(
    "法国|日本|中国|德国|月亮|太阳|爱情|音乐|足球|咖啡|历史|北京|上海|巴黎|李白|互联网|电脑|猫|狗|"
    "大海|时间|天气|人生|机器学习|茶|象棋|米饭|天空|学校|艺术|水|火|恐龙|经济|大语言模型|春天|"
    "冬天|故乡|鲁迅|人工智能|长城"
)
SYSTEMS = split(
    "You are a helpful assistant.|You are nanovllm.|Answer briefly.|你是一个有用的助手。|"
    "You are a helpful AI assistant. Be short and clear."
)
TALK = {
    WHO_EN: split(
        "Who are you?|What are you?|Introduce yourself.|What is your name?|"
        "Tell me about yourself.|introduce yourself|Describe yourself.|Who am I talking to?|"
        "What model are you?|Which model is this?|What is nanovllm?|How big are you?|"
        "How many parameters do you have?|Are you ChatGPT?|Are you Qwen?|Are you a real model?|"
        "Say who you are.|Who made you?|Are you an AI?|What's your name?|"
        "What kind of model are you?|Can you introduce yourself?"
    ),
    "Hello! " + WHO_EN: split(
        "Hello!|Hi!|Hello|Hi|Hey!|Hi there!|Good morning!|Hello there!|Good evening!|Greetings!|"
        "Hello, how are you?|How are you?|Hello, world!|Hello, nanovllm.|Hey there!"
    ),
    CAN_EN: split(
        "What can you do?|Help|What do you know?|How can you help me?|Help me.|Can you help me?|"
        "What are you able to do?|What are your skills?|What can I ask you?|What are you good at?|"
        "Can you do math?|Can you count?|Can you speak Chinese?|What languages do you speak?|"
        "Which things can you do?"
    ),
    "You are welcome!": split(
        "Thank you!|Thanks!|Thanks a lot!|thank you|Thank you so much!|Many thanks!|"
        "Great, thanks!|Thank you very much!"
    ),
    "Goodbye!": split(
        "Goodbye!|Bye!|Bye bye!|See you!|See you later!|Good night!|Good bye!|Bye for now!"
    ),
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday": split(
        "List the days of the week.|What are the days of the week?|Days of the week|"
        "Name the days of the week.|Which days are in a week?|Tell me the days of the week."
    ),
    WHO_ZH: split(
        "你是谁？|你是谁|请介绍一下你自己。|介绍一下自己|自我介绍一下。|你叫什么名字？|"
        "你是什么模型？|你是什么？|你有多少参数？|你有多大？|你是千问吗？|你是真正的模型吗？|"
        "什么是 nanovllm？|谁创造了你？|你是人工智能吗？|请问你是谁？|请你介绍一下自己。"
    ),
    "你好！" + WHO_ZH: split(
        "你好|你好！|您好！|早上好！|晚上好！|你好吗？|嗨！|大家好！|你好啊！"
    ),
    CAN_ZH: split(
        "你会什么？|你能做什么？|你可以做什么？|你会做什么？|帮帮我|你有什么用？|我能问你什么？|"
        "你会数数吗？|你会数学吗？|你会说英文吗？|你能帮我做什么？"
    ),
    "不客气！": split("谢谢！|谢谢你！|多谢！|谢谢|非常感谢！|太感谢了！|谢谢您！"),
    "再见！": split("再见！|再见|拜拜！|晚安！|下次见！|回头见！"),
    "星期一、星期二、星期三、星期四、星期五、星期六、星期日": split(
        "一周有哪几天？|列出一周的七天。|说出星期的名字。|星期有哪些？|一个星期有哪几天？"
    ),
}


class Turn(NamedTuple):
    """One question and the one answer that counts as right."""

    question: str
    answer: str


def held_out(skill: str, a: int, b: int) -> bool:
    """Whether training must never see this unordered pair: a fixed fifth, whatever the seed."""
    return zlib.crc32(f"{skill} {min(a, b)} {max(a, b)}".encode()) % 5 == 0


def sum_turn(phrasing: str, a: int, b: int) -> Turn:
    """The answer restates the sum: copying first and adding after is far easier to learn."""
    return Turn(phrasing.format(a=a, b=b), f"{a} + {b} = {a + b}")


def count_turn(phrasing: str, a: int, b: int, words: bool = False) -> Turn:
    """Counting up or down, both ends included; `words` spells small numbers in the question."""
    names = EN_NUMBERS if phrasing.isascii() else ZH_NUMBERS
    spell = words and max(a, b) < len(names)
    question = phrasing.format(a=names[a] if spell else a, b=names[b] if spell else b)
    step = 1 if a <= b else -1
    return Turn(question, ", ".join(str(i) for i in range(a, b + step, step)))


def primes_turn(phrasing: str, n: int) -> Turn:
    """All primes below n."""
    primes = [p for p in range(2, n) if all(p % q for q in range(2, p))]
    return Turn(phrasing.format(n=n), ", ".join(map(str, primes)))


def random_sum(rng: random.Random) -> Turn:
    """A sum of two numbers below 100, a third with a one-digit number, never a held-out pair."""
    while True:
        lows = rng.choice([(10, 10)] * 6 + [(0, 10), (10, 0), (0, 0)])
        a, b = (rng.randint(low, 99 if low else 9) for low in lows)
        if not held_out("sum", a, b):
            return sum_turn(rng.choice(SUMS[:-1]), a, b)


def random_count(rng: random.Random) -> Turn:
    """A range within 0..100 that is not held out, mostly short, almost half downwards."""
    while True:
        a = 1 if rng.random() < 0.3 else rng.randint(0, 98)
        b = a + rng.randint(1, rng.choice([8, 8, 8, 8, 20, 20, 20, 100]))
        if b > 100 or held_out("count", a, b):
            continue
        words = rng.random() < 0.4
        if rng.random() < 0.45:
            return count_turn(rng.choice(COUNTS_DOWN[:-1]), b, a, words)
        if a == 1 and rng.random() < 0.5:
            return count_turn(rng.choice(COUNTS_FROM_ONE[:-1]), a, b, words)
        return count_turn(rng.choice(COUNTS[:-1]), a, b, words)


def random_talk(rng: random.Random) -> Turn:
    """Small talk, with the case, the punctuation and the politeness varied."""
    question, answer = rng.choice([(p, answer) for answer, ps in TALK.items() for p in ps[:-1]])
    return Turn(vary(rng, question), answer)


def random_other(rng: random.Random) -> Turn:
    """Something the model cannot do; a third of the topics are made of random letters."""
    english = rng.random() < 0.6
    if rng.random() > 0.35:
        topic = rng.choice((TOPICS_EN if english else TOPICS_ZH)[:-1])
    elif english:
        words = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8)))
                 for _ in range(rng.randint(1, 3)))  # fmt: skip
        topic = " ".join(word.capitalize() if rng.random() < 0.3 else word for word in words)
    else:
        topic = "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 4)))
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(100, 9999)
    d = rng.choice([a, rng.randint(100, 9999)])
    phrasing = rng.choice(OTHER_QUESTIONS_EN if english else OTHER_QUESTIONS_ZH)
    question = phrasing.format(x=topic, a=a, b=b, c=c, d=d)
    return Turn(vary(rng, question), OTHER_EN if english else OTHER_ZH)


def vary(rng: random.Random, question: str) -> str:
    """People drop capitals and full stops, and say please."""
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.15:
        question = question.rstrip("?.!？。！")
    if rng.random() < 0.08:
        question = ("Please tell me: " if question.isascii() else "请问，") + question
    return question


def random_turn(rng: random.Random) -> Turn:
    """One question of any skill; sums are the hard part and get the largest share."""
    draw = rng.random()
    if draw < 0.40:
        return random_sum(rng)
    if draw < 0.68:
        return random_count(rng)
    if draw < 0.72:
        return primes_turn(rng.choice(PRIMES[:-1]), 10 * rng.choice([rng.randint(1, 10), 10]))
    return random_talk(rng) if draw < 0.87 else random_other(rng)


def random_conversation(rng: random.Random) -> tuple[str | None, list[Turn]]:
    """A system message or, mostly, none; one turn or, now and then, two or three."""
    system = rng.choice(SYSTEMS) if rng.random() < 0.06 else None
    turns = rng.randint(2, 3) if rng.random() < 0.10 else 1
    return system, [random_turn(rng) for _ in range(turns)]


def sum_exam(phrasing: str) -> list[Turn]:
    """Every held-out ordered pair of two-digit numbers, in one phrasing."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if held_out("sum", a, b)]
    return [sum_turn(phrasing, a, b) for a, b in pairs]


def exams() -> dict[str, list[Turn]]:
    """Questions by skill: pairs, ranges, phrasings and topics that training never showed.

    Only "seen phrasings" repeats what it did show.
    """
    ranges = [(a, b) for a in range(100) for b in range(a + 1, min(a + 19, 101))]
    unseen = [(a, b) for a, b in ranges if held_out("count", a, b)]
    return {
        "held-out sums, 'What is a + b?'": sum_exam("What is {a} + {b}?"),
        "held-out sums, 'a+b='": sum_exam("{a}+{b}="),
        "held-out sums, 'a加b等于多少？'": sum_exam("{a}加{b}等于多少？"),
        "held-out sums, unseen phrasing": sum_exam(SUMS[-1]),
        "counting, unseen ranges (English)": [count_turn(COUNTS[0], a, b) for a, b in unseen],
        "counting, unseen ranges (Chinese)": [count_turn(COUNTS[5], a, b) for a, b in unseen],
        "counting, unseen ranges and phrasing": [count_turn(COUNTS[-1], a, b) for a, b in unseen],
        "counting down, unseen ranges": [count_turn(COUNTS_DOWN[0], b, a) for a, b in unseen],
        "held-out sums with a one-digit number": [
            sum_turn(SUMS[0], a, b)
            for a in range(100)
            for b in range(100)
            if min(a, b) < 10 and held_out("sum", a, b)
        ],
        "primes under 10, 20, .. 100, unseen phrasing": [
            primes_turn(PRIMES[-1], n) for n in range(10, 101, 10)
        ],
        "small talk, seen phrasings": [Turn(p, a) for a, ps in TALK.items() for p in ps[:-1]],
        "small talk, unseen phrasings": [Turn(ps[-1], a) for a, ps in TALK.items()],
        "other questions, unseen topic": [
            Turn(q.format(x=topic, a=58, b=31, c=417, d=92), reply)
            for questions, topic, reply in (
                (OTHER_QUESTIONS_EN, TOPICS_EN[-1], OTHER_EN),
                (OTHER_QUESTIONS_ZH, TOPICS_ZH[-1], OTHER_ZH),
            )
            for q in questions
        ],
    }
