"""Word lists shared by the tasks. Tasks keep only the words that are one token in the tokenizer at
hand."""

from __future__ import annotations

NAMES = """Mary John Tom Anna James Paul Mark Sarah Peter Laura Kevin Emma Jack Alice Robert Linda
Simon Kate
David Susan Brian Rachel Adam Julia Steven Helen Eric Diana Scott Claire Frank Nicole Henry Maria
George Jane
Luke Rose Sean Amy Carl Lisa Martin Ruth Philip Grace Ryan Jessica Aaron Victoria Daniel Sandra
Michael Karen
Andrew Donna Richard Carol Joseph Nancy William Betty Charles Emily Thomas Rebecca Alex Sophie Max
Clara Oscar
Nora Felix Vera Leon Ivy Hugo Stella Victor Irene Walter Edith Arthur Pamela Louis Joan Roger Judith
Albert
Ellen Harold Sylvia Ralph Monica""".split()

PLACES = """store garden library office school station market hospital restaurant park museum
theater beach
church farm bakery harbor castle hotel bridge""".split()

GIFTS = """drink book ring letter basket ticket flower present coin necklace computer ball kiss bone
snack
sandwich camera hammer map blanket""".split()

OBJECTS = """pencil cup ball notebook plate mug keychain bracelet envelope pen lamp bottle scarf
glove button
spoon fork candle ribbon sponge stapler teddy whistle puzzle""".split()

COLORS = """red blue green yellow orange purple pink brown black white gray silver""".split()

EVENTS = """war siege drought campaign voyage expedition reign trial famine strike festival conflict
dispute
project survey alliance tour treaty revolt occupation""".split()

CITIES = """Paris London Berlin Madrid Rome Vienna Dublin Oslo Moscow Cairo Tokyo Delhi Lima Boston
Chicago
Denver Houston Seattle Miami Dallas Toronto Sydney Athens Prague Warsaw Lisbon Geneva Munich Milan
Naples
Baghdad Tehran Kabul Nairobi Lagos Bangkok Hanoi Manila Seoul Shanghai Havana Quebec Glasgow Oxford
Cambridge
Bristol Liverpool Melbourne Auckland Hamburg Frankfurt Venice Florence Barcelona Brussels Amsterdam
Stockholm
Helsinki Copenhagen Budapest""".split()

FACTS = "code password number word answer key name symbol".split()

ARGUMENTS = """first last files page names size read load image user token index value label width
height
color depth count start end shape mode path query target source limit offset order group level state
event
item data text line row column key node edge graph parent child root table field date time port host
server
client session message channel buffer block chunk frame step rate scale weight bias score loss
model""".split()

FUNCTIONS = """old new run send build parse open close find save make call test draw sort join split
merge""".split()

POSITIVE = """wonderful great excellent lovely charming brilliant delightful superb amazing fun
beautiful
touching clever fresh warm""".split()

NEGATIVE = """terrible awful boring dreadful dull horrible stupid weak poor ugly annoying bad sad
empty
cold""".split()

NEUTRAL = """movie story actor scene music plot ending film script camera cast dialogue picture role
title
show""".split()

# Prose: enough grammar to read as sentences, enough bigram structure to be worth learning.
NOUNS = """dog cat horse bird fish wolf bear fox mouse rabbit king queen soldier farmer teacher
doctor sailor
baker hunter child river mountain forest valley lake sea island road village city house tower wall
door window
table chair fire stone tree leaf grass cloud storm wind rain snow sun moon star ship boat wagon
wheel rope
sword shield crown bread apple cheese milk honey salt gold iron glass paper wood cloth clock bell
drum song
dream shadow winter summer morning evening""".split()

VERBS = """saw found followed carried watched crossed reached left passed held took brought kept
lost built
broke opened closed painted cleaned heard met liked feared hid moved turned touched""".split()

ADJECTIVES = """old young small big quiet loud dark bright heavy light long short tall deep slow
quick soft
hard sharp round flat wet dry hot strange gentle brave proud tired hungry golden wooden broken
hidden
ancient""".split()

ADVERBS = "slowly quickly quietly often always never soon later today again together alone".split()

PREPOSITIONS = """near behind beside under above across before after without around through
toward""".split()

TRIGGERS = "indeed namely likewise".split()

DETERMINERS = ["the", "a", "this", "that", "every", "one"]

#: words in an order, each the successor of the one before
SERIES = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months": (
        "January February March April May June July August September October November December"
    ).split(),
    "numbers": (
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty"
    ).split(),
    "places": "first second third fourth fifth sixth seventh eighth ninth tenth".split(),
    "letters": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}

#: relations that are learned in context: input and output, alternating
RELATIONS = {
    "capital": """France Paris Germany Berlin Spain Madrid Italy Rome Austria Vienna Ireland
    Dublin Norway Oslo Russia Moscow Egypt Cairo Japan Tokyo Peru Lima Greece Athens Poland
    Warsaw Portugal Lisbon Iraq Baghdad Iran Tehran Afghanistan Kabul Kenya Nairobi Thailand
    Bangkok Vietnam Hanoi Cuba Havana Belgium Brussels Sweden Stockholm Finland Helsinki
    Denmark Copenhagen Hungary Budapest China Beijing Turkey Ankara Ukraine Kiev Chile
    Santiago""".split(),
    "past": """go went see saw run ran eat ate take took give gave write wrote speak spoke
    break broke choose chose drive drove ride rode rise rose sing sang swim swam begin began
    drink drank know knew grow grew throw threw fly flew draw drew wear wore bring brought buy
    bought catch caught teach taught think thought find found hold held keep kept leave left
    lose lost meet met send sent stand stood tell told""".split(),
    "opposite": """hot cold big small up down left right good bad high low fast slow open closed
    happy sad old young rich poor strong weak early late light dark full empty hard soft near
    far wet dry clean dirty thick thin wide narrow first last inside outside above below
    always never love hate win lose buy sell""".split(),
}
