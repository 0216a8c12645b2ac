"""The words that `request_type` looks for, in the languages that its labelled prompts have."""

from __future__ import annotations

from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CODE_WORDS: Final = _words(
    """
    python javascript typescript java rust go golang kotlin swift ruby php perl scala haskell elixir dart c matlab
    bash shell powershell sql mysql postgresql postgres mongodb redis graphql html css react vue angular django flask
    fastapi express node nodejs npm docker dockerfile kubernetes helm terraform ansible nginx systemd cron git github
    webpack pytest junit numpy pandas pytorch tensorflow lua vba solidity prolog lisp vhdl arduino latex jq awk sed
    code function funktion función fonction função método method class klasse clase classe struct interface enum trait
    regex regexp regular expression query abfrage requête consulta script skript snippet programm program algorithm
    algorithmus api endpoint json yaml toml xml csv schema migration database unit test tests decorator generator
    iterator array arrays list comprehension dictionary dict dictionaries hashmap hash string strings tuple pointer
    loop recursion recursive async await thread threads mutex compile compiler linker makefile command line cli
    manifest deployment middleware hook component widget socket websocket protobuf grpc cache trie stack queue heap
    tree graph sort quicksort mergesort parser tokenizer fizzbuzz fibonacci boilerplate refactor debug linq css
    playbook workflow macro template typescript one liner pseudocode svg yaml promql grafana stored procedure trigger
    functions webassembly dataclass type hints config configuration gitignore pyproject commit codec module
    svelte nextjs nuxt tailwind bootstrap jquery deno bun spring hibernate rails laravel symfony dotnet aspnet unity
    flutter android ios xcode gradle maven cmake cargo pip poetry conda yarn vite eslint prettier celery kafka
    rabbitmq elasticsearch sqlite mariadb oracle dynamodb s3 lambda aws gcp azure openapi swagger oauth jwt cors http
    https url urls fetch post get put request requests response header headers cookie session proxy server client
    localhost port tcp udp ssh ssl tls dns browser dom div span button form input navbar stylesheet selector flexbox
    grid canvas pixel sprite table column columns row rows index indexes join primary foreign key transaction orm
    variable variables constant integer int float boolean bool byte bytes char null nil none undefined pointer
    reference object objects inheritance polymorphism constructor instance static abstract generic generics lambda
    closure callback promise coroutine event listener iterator enumerate map filter reduce slice append push pop
    import export package library dependency namespace build compile runtime interpreter bytecode binary hex ascii
    utf8 unicode encode decode base64 hash md5 sha256 encrypt decrypt file files directory folder path stdin stdout
    log logs logging cron crontab daemon container image volume cluster pod ingress yaml backoff retry timeout
    pagination cache caching singleton factory observer mutex semaphore deadlock async parallel concurrency backend
    frontend fullstack crud todo app webapp website scraper bot cli gui plugin extension theme login upload download
    datei dateien tabelle spalte liste zeichenkette klasse variable datum komponente seite programmcode tabla fichero
    js ts tsx jsx cpp jest mocha cypress playwright selenium jenkinsfile jenkins zig terminal cursor epoch iso linter
    lint mock stub endpoint environment script trigger squares duplicates dedupe inline snippet snippets argument stack
    archivo cadena fichier tableau chaîne décorateur composant pagina file bestand
    """
)
MAKE_WORDS: Final = _words(
    """
    write implement create generate build code program fix refactor convert port rewrite complete add make optimise
    optimize debug turn parse script show scaffold patch correct extract sort center centre remove rename replace
    shrink speed deploy install configure set setup connect read print return check validate format render draw
    sortiere baue mach zeige füge ergänze donne affiche ajoute hazme haz muestra añade mostra aggiungi voeg
    schreibe schreib programmiere erstelle implementiere korrigiere écris crée implémente corrige escribe crea genera
    implementa arregla escreva crie scrivi crea schrijf maak napisz напиши реализуй
    """
)
ANALYSIS_WORDS: Final = _words(
    """
    analyse analyze analysis compare comparison contrast evaluate assess discuss explain examine interpret critique
    weigh justify prove derive summarise summarize review outline argue argument arguments judge determine estimate
    investigate reflect synthesise reconstruct recommend propose plan develop design consider reason identify
    reconcile describe trace rank advise elaborate contextualise contextualize characterise survey appraise debate
    predict forecast model conclude infer deduce criticise criticize scrutinise map walk break defend challenge case
    denke wäge ordne zeige begründen distingue argumenta raisonne décrivez montrez valora
    analysiere vergleiche erkläre erörtere bewerte interpretiere untersuche stelle beurteile begründe
    analysez comparez expliquez discutez évaluez analiza compara explica evalúa discute analise confronta valuta
    vergelijk leg проанализируйте сравните объясните
    """
)
REASON_WORDS: Final = _words(
    """
    why because causes consequences implications tradeoff trade offs pros cons advantages disadvantages benefits
    drawbacks risks strategy strategies detail detailed depth thorough thoroughly step steps critically systematically
    evidence assumptions hypothesis hypotheses perspective perspectives versus long term ethics ethical policy
    policies theory theories economic political social historical impact factors lessons extent role significance
    folgen folge conditions ever whether wise necessary deserves convince better worse sure effect affect fair reasoning
    conclude conclusion critical balanced implies scenario scenarios how should would could suppose imagine if happen
    happens explains shape shaped role led options option decision decide dilemma justified compatible conflict both
    sides side stand view views against opinion intuition process approach budget strategy memo regulator society
    culture cultures government governments market markets economy inequality democracy power history moral religion
    climate inflation tax taxes wages trade war crisis effects effet effets würde gewinner verlierer wäre sollte
    factores políticos serait seraient pourquoi perché por causas consecuencias argumentos ventajas ursachen
    vorteile nachteile risiken begründung warum ausführlich causes conséquences avantages inconvénients mesure
    impactos prazo причины аргументы trends patterns debate fair differential mechanism
    """
)
FAULT_WORDS: Final = _words(
    """
    typeerror valueerror importerror keyerror nameerror nullpointerexception exception traceback segfault segmentation
    undefined bug error stacktrace crash fehler erreur
    """
)
GREETING_WORDS: Final = _words(
    """
    hello hi hey thanks thank bye ok okay yes no good morning evening please danke hallo merci bonjour hola gracias
    ciao repeat continue there
    """
)
FACT_STARTS: Final = _words(
    """
    what who when where which whose whats is are does do did can name define convert translate spell tell give was wer
    wann wo wie welche welcher ist quel quelle qui combien comment où qué quién cuándo cuál cuántos cuántas dónde qual
    quanto chi hoe wie wat vad jaka kolik mikä сколько кто как столица traduce übersetze
    """
) | {"how many", "how much", "how old", "how tall", "how far", "how long", "how do", "what s", "what is", "who s"}
WHY: Final = _words("why warum wieso weshalb pourquoi perché waarom почему varför dlaczego")
OWN_WORDS: Final = _words("my our we us i unser unsere wir mein ich notre nous mon mi nuestro nosotros nostro")
CODE_PARTS: Final = (
    "関数",
    "コード",
    "函数",
    "代码",
    "表达式",
    "実装",
    "实现",
    "정규",
    "함수",
    "функци",
    "sql",
    "python",
    "java",
)
ANALYSIS_PARTS: Final = (
    "分析",
    "比较",
    "比較",
    "解释",
    "説明",
    "论",
    "論じ",
    "评估",
    "影响",
    "原因",
    "提言",
    "观点",
    "観点",
)
FACT_PARTS: Final = ("どこ", "何と", "いくつ", "高さは", "哪里", "多少", "什么", "어디", "ما هي", "क्या", "谁", "誰")
