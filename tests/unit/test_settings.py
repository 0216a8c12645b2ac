"""Reading settings: the file, the environment over it, and mistakes that say where and what to do."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec import inspect as shapes

from sutazai.core.errors import SettingsError
from sutazai.settings.check import RANGES
from sutazai.settings.decode import SHAPE
from sutazai.settings.load import data_dir, environment_names, find, load, parse, plain, show, user_file
from sutazai.settings.model import (
    Database,
    ModelSettings,
    NodeSettings,
    Server,
    Settings,
    Timeouts,
)
from sutazai.settings.secret import Secret


def mistakes(text: str = "", **environ: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        parse(text, environ)
    return caught.value.mistakes


def only_mistake(text: str = "", **environ: str) -> str:
    (mistake,) = mistakes(text, **environ)
    return mistake


def test_nothing_at_all_gives_the_defaults() -> None:
    assert parse("", {}) == Settings()
    assert load(None, {"HOME": "/root", "PATH": "/bin"}) == Settings()


def test_a_file_sets_groups_nodes_and_models(tmp_path: Path) -> None:
    path = tmp_path / "sutazai.toml"
    path.write_text(
        """
        [server]
        port = 11000
        drain_s = 5
        allowed_hosts = ["chat.example.org"]

        [[nodes]]
        url = "http://10.0.0.5:11434"
        slots = 2
        models = ["llama3.2:1b"]
        api_key = "sesame"

        [models."llama3.2:1b"]
        context_buckets = [2048, 8192]
        load_options = { num_gpu = 1, low_vram = true, ratio = 0.5 }
        """
    )

    settings = load(path, {})

    assert settings.server == Server(port=11000, drain_s=5.0, allowed_hosts=("chat.example.org",))
    assert settings.nodes == (
        NodeSettings(
            url="http://10.0.0.5:11434",
            name="10.0.0.5:11434",
            slots=2,
            models=("llama3.2:1b",),
            api_key=Secret("sesame"),
        ),
    )
    options: dict[str, int | float | bool] = {"num_gpu": 1, "low_vram": True, "ratio": 0.5}
    assert settings.models == {"llama3.2:1b": ModelSettings(context_buckets=(2048, 8192), load_options=options)}


def test_a_whole_number_for_seconds_becomes_a_float() -> None:
    settings = parse("[timeouts]\ntotal_s = 60", {})

    assert type(settings.timeouts.total_s) is float


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "sutazai.toml"
    path.write_bytes(b"\xef\xbb\xbf[server]\nport = 1\n")

    assert load(path, {}).server.port == 1


# --- Nodes ---


@pytest.mark.parametrize(
    ("url", "kept", "name"),
    [
        ("http://10.0.0.5:11434/", "http://10.0.0.5:11434", "10.0.0.5:11434"),
        ("http://gpu:8000/v1", "http://gpu:8000", "gpu:8000"),
        ("https://gpu/v1/", "https://gpu", "gpu:443"),
        ("http://gpu", "http://gpu", "gpu:80"),
        ("HTTP://GPU:8000/models/v1", "http://gpu:8000/models", "gpu:8000"),
        ("http://[::1]:8080/", "http://[::1]:8080", "[::1]:8080"),
        ("http://ollama_1:11434//", "http://ollama_1:11434", "ollama_1:11434"),
    ],
)
def test_a_node_address_is_normalised_and_names_the_node(url: str, kept: str, name: str) -> None:
    (node,) = parse(f'[[nodes]]\nurl = "{url}"', {}).nodes

    assert (node.url, node.name) == (kept, name)


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("gpu:8000", "was not an http"),
        ("ftp://gpu", "was not an http"),
        ("http://", "was not an http"),
        ("http://:8000", "was not an http"),
        ("http://joe@gpu", "held a user name"),
        ("http://joe:hunter2@gpu", "held a user name"),
        ("http://gpu?key=hunter2", "held a query"),
        ("http://gpu/#hunter2", "held a query"),
        ("http://gpu?", "held a query"),
        ("http://gpu:99999", "had a wrong host or port"),
        ("http://gpu:0", "had no usable host or port"),
        ("http://[::1", "had a wrong host or port"),
        ("http://g<p>u", "had no usable host or port"),
        ("http://g u", "held a space"),
        ("http://gpü", "held a space"),
        ("", "held a space"),
    ],
)
def test_a_wrong_node_address_is_refused_and_not_repeated(url: str, wrong: str) -> None:
    mistake = only_mistake(f'[[nodes]]\nurl = "{url}"')

    assert mistake.startswith(f"sutazai.toml: nodes[0].url (line 2) {wrong}")
    assert "hunter2" not in mistake


def test_a_name_given_twice_is_a_mistake_also_when_it_is_a_default() -> None:
    text = '[[nodes]]\nurl = "http://a:1"\n[[nodes]]\nurl = "http://b:1"\nname = "a:1"'

    assert only_mistake(text) == "sutazai.toml: nodes (line 1) named a:1 2 times; give each a name of its own."


def test_a_name_with_line_ends_is_refused_because_it_goes_into_headers() -> None:
    assert "nodes[0].name" in only_mistake('[[nodes]]\nurl = "http://a:1"\nname = "a\\r\\nb"')


# --- Mistakes ---


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (
            "[server]\nprot = 1",
            "sutazai.toml: server.prot (line 2) was not known; did you mean server.port?",
        ),
        ("[sever]\nport = 1", "sutazai.toml: sever (line 1) was not known; did you mean server?"),
        ("total_s = 3", "sutazai.toml: total_s (line 1) was not known; did you mean timeouts.total_s?"),
        ("[server]\nxyzzy = 3", "sutazai.toml: server.xyzzy (line 2) was not known; remove it."),
        (
            '[server]\nport = "80"',
            "sutazai.toml: server.port (line 2) was a string; give a whole number.",
        ),
        (
            "[server]\nport = true",
            "sutazai.toml: server.port (line 2) was true; give a whole number.",
        ),
        (
            "[server]\nport = 1.0",
            "sutazai.toml: server.port (line 2) was a number with a point; give a whole number.",
        ),
        (
            "[auth]\nrequired = 1",
            "sutazai.toml: auth.required (line 2) was a whole number; give true or false.",
        ),
        (
            "[server]\nhost = 1979-05-27",
            "sutazai.toml: server.host (line 2) was a date or a time; give a string.",
        ),
        (
            "[server]\nallowed_hosts = 'a'",
            "sutazai.toml: server.allowed_hosts (line 2) was a string; give a list of strings.",
        ),
        ("server = 3", "sutazai.toml: server (line 1) was a whole number; give a table."),
        ("[nodes]\nurl = 'a'", "sutazai.toml: nodes (line 1) was a table; give a list of tables."),
        ("models = ['a']", "sutazai.toml: models (line 1) was a list; give a table of tables."),
        (
            "[logs]\nlevel = 'loud'",
            'sutazai.toml: logs.level (line 2) was "loud"; give one of "debug", "error", "info", "warning".',
        ),
        (
            "[timeouts]\nidle_s = -1",
            "sutazai.toml: timeouts.idle_s (line 2) was -1.0; give a number from 0.001 to 31536000.",
        ),
        (
            "[timeouts]\nidle_s = nan",
            "sutazai.toml: timeouts.idle_s (line 2) was nan; give a number from 0.001 to 31536000.",
        ),
        (
            f"[timeouts]\nidle_s = {2**64}",
            "sutazai.toml: timeouts.idle_s (line 2) was a number of more than 64 bits; give a number.",
        ),
        (
            f"[server]\nport = {2**63}",
            "sutazai.toml: server.port (line 2) was a number of more than 64 bits; give a whole number.",
        ),
        (
            "[server]\nport = 65536",
            "sutazai.toml: server.port (line 2) was 65536; give a number from 0 to 65535.",
        ),
        (
            "[retry]\nattempts = 0",
            "sutazai.toml: retry.attempts (line 2) was 0; give a number from 1 to 100.",
        ),
        (
            "[server]\nmax_head_bytes = 1",
            "sutazai.toml: server.max_head_bytes (line 2) was 1; give a number of at least 1024.",
        ),
        ("[[nodes]]\nname = 'a'", "sutazai.toml: nodes[0] (line 1) lacked url; give a string."),
        (
            "[[nodes]]\nurl = 'http://a'\n\n[[nodes]]\nurl = 'http://b'\nslots = 0",
            "sutazai.toml: nodes[1].slots (line 6) was 0; give a number from 1 to 1000000.",
        ),
        (
            "[[discovery.dns]]\nname = 'a'\nport = 0",
            "sutazai.toml: discovery.dns[0].port (line 3) was 0; give a number from 1 to 65535.",
        ),
        (
            "[[auto.rules]]\ncontains = ''\nkind = 'simple_queries'",
            "sutazai.toml: auto.rules[0].contains (line 2) was empty, and every question holds that; give a word.",
        ),
        (
            '[auto]\nsimple_queries = ["a", "b\\r\\nx-evil: 1"]',
            "sutazai.toml: auto.simple_queries[1] (line 2) was not a name of 1 to 256 printable characters; "
            "give a model's name.",
        ),
        (
            '[models.a]\nfallback = [""]',
            "sutazai.toml: models.a.fallback[0] (line 2) was not a name of 1 to 256 printable characters; "
            "give a model's name.",
        ),
        ('[auto]\nname = "a\\n"', "sutazai.toml: auto.name (line 2) held control characters; give a plain name."),
    ],
)
def test_a_mistake_tells_the_place_what_was_wrong_and_what_to_do(text: str, mistake: str) -> None:
    assert only_mistake(text) == mistake


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[server]\nhost = ''", "server.host"),
        ("[server]\nhost = 'a b'", "server.host"),
        ("[server]\nallowed_hosts = ['a', 'http://b']", "server.allowed_hosts[1]"),
        ("[server]\nallowed_origins = ['https://a/']", "server.allowed_origins[0]"),
        ("[server]\nallowed_origins = ['a.example']", "server.allowed_origins[0]"),
        ("[server]\nmax_body_bytes = 1000000000", "server.max_buffered_bytes"),
        ("[web]\nallowed = ['10.0.0.0/8', 'http://a']", "web.allowed[1]"),
        ("[models.a]\ncontext_buckets = []", "models.a.context_buckets"),
        ("[models.a]\ncontext_buckets = [0, 1]", "models.a.context_buckets"),
        ("[models.a]\ncontext_buckets = [4, 2]", "models.a.context_buckets"),
        ("[models.a]\ncontext_buckets = [4, 4]", "models.a.context_buckets"),
        ("[models.a]\nload_options = { num_ctx = 4 }", "models.a.load_options.num_ctx"),
        ("[models.a]\nload_options = { x = inf }", "models.a.load_options.x"),
        ("[models.a]\nload_options = { x = 'y' }", "models.a.load_options.x"),
        ('[models.""]', 'models.""'),
        ('[models."b c"]\nx = 1', 'models."b c".x'),
        ("[[discovery.dns]]\nname = 'http://a'", "discovery.dns[0].name"),
        ("[[discovery.dns]]\nname = 'a'\n[[discovery.dns]]\nname = 'a'", "discovery.dns"),
    ],
)
def test_values_of_the_right_type_are_checked_too(text: str, place: str) -> None:
    assert only_mistake(text).startswith(f"sutazai.toml: {place} (line ")


@pytest.mark.parametrize("origin", ["*", "https://a.example", "http://localhost:3000", "tauri://localhost"])
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    assert parse(f"[server]\nallowed_origins = ['{origin}']", {}).server.allowed_origins == (origin,)


def test_all_mistakes_of_file_and_environment_are_told_at_once() -> None:
    text = "x = 1\n[server]\nport = -1\n[[nodes]]\nslots = 0\n[retry]\nattempts = 'a'\n"

    told = mistakes(text, SUTAZAI_LOGS_LEVEL="loud", SUTAZAI_SERVR_PORT="1", SUTAZAI_AUTH_REQUIRED="perhaps")

    places = [" ".join(mistake.split()[:2]) for mistake in told]
    assert sorted(places) == [
        "environment: SUTAZAI_AUTH_REQUIRED",
        "environment: SUTAZAI_LOGS_LEVEL",
        "environment: SUTAZAI_SERVR_PORT",
        "sutazai.toml: nodes[0]",
        "sutazai.toml: retry.attempts",
        "sutazai.toml: server.port",
        "sutazai.toml: x",
    ]


def test_broken_toml_is_told_with_line_and_column_and_the_environment_is_still_checked() -> None:
    broken, unknown = mistakes("[server]\nport = = 3\n", SUTAZAI_SERVR_PORT="1")

    assert broken == "sutazai.toml was not TOML: Invalid value (at line 2, column 8); correct it there."
    assert unknown == "environment: SUTAZAI_SERVR_PORT was not known; did you mean SUTAZAI_SERVER_PORT?"


@pytest.mark.parametrize("text", ["x = " + "[" * 10_000, "x = " + "9" * 5000, "x = 0x" + "f" * 5000, "\x00", "["])
def test_text_that_upsets_the_parser_is_a_mistake_like_any_other(text: str) -> None:
    assert "sutazai.toml" in only_mistake(text)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone.toml"

    with pytest.raises(SettingsError, match=r"gone\.toml could not be read: No such file"):
        load(gone, {})
    with pytest.raises(SettingsError, match="could not be read: Is a directory"):
        load(tmp_path, {})


def test_a_file_that_is_not_utf_8_is_told_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "sutazai.toml"
    path.write_bytes(b"[server]\nhost = '\xff'\n")

    with pytest.raises(SettingsError, match="was not UTF-8 in line 2; save it as UTF-8"):
        load(path, {})


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(SettingsError, match="larger than 1 MiB"):
        load(Path("/dev/zero"), {})


# --- The environment ---


def test_the_environment_wins_over_the_file() -> None:
    settings = parse(
        "[server]\nport = 1\nhost = '127.0.0.2'\n[timeouts]\nidle_s = 'x'",
        {"SUTAZAI_SERVER_PORT": "2", "SUTAZAI_TIMEOUTS_IDLE_S": "7"},
    )

    assert settings.server == Server(port=2, host="127.0.0.2")
    assert settings.timeouts == Timeouts(idle_s=7.0)


def test_each_type_is_read_from_the_environment() -> None:
    settings = parse(
        "",
        {
            "SUTAZAI_SERVER_PORT": "0",
            "SUTAZAI_RETRY_BUDGET_RATIO": "0.5",
            "SUTAZAI_SERVER_ALLOWED_HOSTS": "a.example, b.example,",
            "SUTAZAI_ENGINE_ENABLED": "never",
            "SUTAZAI_DATABASE_URL": "postgresql://a:b@c/d",
        },
    )

    assert settings.server == Server(port=0, allowed_hosts=("a.example", "b.example"))
    assert settings.retry.budget_ratio == 0.5
    assert settings.engine.enabled == "never"
    assert settings.database == Database(url=Secret("postgresql://a:b@c/d"))


@pytest.mark.parametrize(("text", "value"), [("true", True), ("YES", True), ("1", True), ("No", False), ("0", False)])
def test_truth_has_several_spellings(text: str, value: bool) -> None:
    assert parse(f"[logs]\naccess = {str(not value).lower()}", {"SUTAZAI_LOGS_ACCESS": text}).logs.access is value


def test_an_empty_database_url_means_none() -> None:
    settings = parse("[database]\nurl = 'postgresql://a/b'", {"SUTAZAI_DATABASE_URL": ""})

    assert settings.database.url is None


def test_nodes_from_the_environment_replace_those_of_the_file() -> None:
    settings = parse(
        "[[nodes]]\nurl = 'http://old:1'",
        {"SUTAZAI_NODES": "http://a:1, openai+http://b:2/v1,llamacpp+https://c"},
    )

    assert [(node.kind, node.url) for node in settings.nodes] == [
        ("ollama", "http://a:1"),
        ("openai", "http://b:2"),
        ("llamacpp", "https://c"),
    ]


def test_mistakes_in_nodes_of_the_environment_name_it() -> None:
    kind, url = mistakes(SUTAZAI_NODES="openia+http://a:1,nonsense")

    assert kind.startswith('environment: SUTAZAI_NODES[0].kind was "openia"; give one of')
    assert url.startswith("environment: SUTAZAI_NODES[1].url was not an http:// or https:// address")


@pytest.mark.parametrize("name", ["SUTAZAI_CONFIG", "SUTAZAI_URL", "SUTAZAI_KEY", "PATH", "OLLAMA_HOST"])
def test_names_that_are_no_settings_are_left_alone(name: str) -> None:
    assert parse("", {name: "x"}) == Settings()


def test_addresses_that_kubernetes_leaves_behind_are_no_mistakes() -> None:
    """A Service called `sutazai` would otherwise keep every gateway beside it from starting."""
    environ = {
        "SUTAZAI_PORT": "tcp://10.0.0.1:10010",
        "SUTAZAI_PORT_10010_TCP_ADDR": "10.0.0.1",
        "SUTAZAI_SERVICE_HOST": "10.0.0.1",
        "SUTAZAI_SERVICE_PORT_HTTP": "10010",
    }

    assert parse("", environ) == Settings()


def test_a_value_that_is_no_text_is_a_mistake() -> None:
    assert "was not UTF-8" in only_mistake(SUTAZAI_DATABASE_DATA_DIR="/\udcff")


@pytest.mark.parametrize("name", sorted(environment_names()))
def test_every_name_of_the_environment_sets_its_setting(name: str) -> None:
    (group, *_), shape = environment_names()[name]
    endings = {"_BYTES": "2048", "_RATIO": "0.125", "WEIGHT": "0.125", "ANTILE": "0.75"}
    text = {
        "SUTAZAI_NODES": "http://a:1",
        "SUTAZAI_DATABASE_URL": "postgresql://a/b",
        "SUTAZAI_DATABASE_REPLICAS": "postgresql://c/b",
        "SUTAZAI_SERVER_HOST": "::1",
        "SUTAZAI_SERVER_ALLOWED_ORIGINS": "https://a",
        "SUTAZAI_SERVER_MAX_BUFFERED_BYTES": str(2**32),
        "SUTAZAI_BATCHING_MAX_WAIT_S": "0.05",
        "SUTAZAI_AUTH_REQUIRED": "true",
        "SUTAZAI_HEDGING_EMBEDDINGS": "true",
        "SUTAZAI_REDIS_URL": "redis://a",
        "SUTAZAI_RABBITMQ_URL": "amqp://a",
        "SUTAZAI_RABBITMQ_MANAGEMENT_URL": "http://a",
        "SUTAZAI_WEBHOOKS_SECRET": "0123456789abcdef",
        "SUTAZAI_OBJECTS_ENDPOINT": "http://a",
        "SUTAZAI_TASKS_PARTITION": "quarter",
    }.get(name, endings.get(name[-6:], other_value(shape)))

    needed = {"SUTAZAI_DATABASE_URL": "postgresql://a/b"} if name == "SUTAZAI_DATABASE_REPLICAS" else {}
    settings = parse("", {**needed, name: text})

    changed = [key for key in settings.__struct_fields__ if getattr(settings, key) != getattr(Settings(), key)]
    assert changed == [group]


def other_value(shape: shapes.Type) -> str:
    match shape:
        case shapes.UnionType(types=(first, *_)):
            return other_value(first)
        case shapes.IntType() | shapes.FloatType():
            return "77"
        case shapes.BoolType():
            return "false"
        case shapes.LiteralType(values=values):
            return min(set(map(str, values)) - {"auto", "info"})
    return "other"


# --- Where things are ---


def test_the_named_file_is_used_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "a.toml").touch()
    (tmp_path / "sutazai.toml").touch()

    assert find({"SUTAZAI_CONFIG": "a.toml"}, tmp_path) == tmp_path / "a.toml"
    assert find({"SUTAZAI_CONFIG": str(tmp_path / "a.toml")}, Path("/")) == tmp_path / "a.toml"
    with pytest.raises(SettingsError, match=r"SUTAZAI_CONFIG named .*b\.toml, which was not there"):
        find({"SUTAZAI_CONFIG": "b.toml"}, tmp_path)


def test_the_working_directory_is_looked_at_before_the_user(tmp_path: Path) -> None:
    (tmp_path / "sutazai.toml").touch()

    assert find({"SUTAZAI_CONFIG": ""}, tmp_path) == tmp_path / "sutazai.toml"


def test_a_user_has_a_file_in_the_home_folder_and_root_in_etc() -> None:
    assert user_file({"HOME": "/home/ada"}, is_root=False) == Path("/home/ada/.config/sutazai/sutazai.toml")
    assert user_file({"HOME": "/root"}, is_root=True) == Path("/etc/sutazai/sutazai.toml")
    assert user_file({}, is_root=False) is None


@pytest.mark.parametrize(
    ("given", "is_root", "folder"),
    [
        ("", True, "/var/lib/sutazai"),
        ("", False, "/home/ada/.local/share/sutazai"),
        ("/srv/data", True, "/srv/data"),
        ("~/data", True, "/home/ada/data"),
        ("~", False, "/home/ada"),
        ("data", False, "data"),
    ],
)
def test_the_data_folder_follows_the_settings_and_the_user(given: str, is_root: bool, folder: str) -> None:
    settings = Settings(database=Database(data_dir=given))

    assert data_dir(settings, {"HOME": "/home/ada"}, is_root) == Path(folder)


def test_a_data_folder_without_a_home_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match="needed HOME"):
        data_dir(Settings(), {}, is_root=False)


# --- Showing ---


def test_hidden_secrets_are_not_taken_for_real_ones() -> None:
    """What `config show` wrote must not start a gateway that sends `…` as its key."""
    settings = parse("[[nodes]]\nurl = 'http://a:1'\napi_key = 'sesame'", {})

    assert 'api_key = "…"  # hidden' in show(settings)
    assert "stands for what `config show` hides" in only_mistake(show(settings))


def test_replicas_need_a_primary_and_are_hidden() -> None:
    alone = only_mistake("[database]\nreplicas = ['postgresql://me:sesame@a/b']")
    assert "stood without the url of a primary" in alone
    wrong = only_mistake("[database]\nurl = 'postgresql://a,b:5433/c'\nreplicas = ['mysql://me:sesame@a/b']")
    assert "was no PostgreSQL address" in wrong
    assert "sesame" not in alone + wrong
    right = parse("[database]\nurl = 'postgresql://a/c'\nreplicas = ['postgresql://me:sesame@a/b']", {})
    assert 'replicas = ["…"]' in show(right)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[shards]]\nname = 'a b'", "was not 1 to 64 letters, digits and . _ -"),
        ("[[shards]]\nname = 'a'\nurl = 'mysql://x'", "was no PostgreSQL address"),
        ("[[shards]]\nname = 'a'\nreplicas = ['postgresql://a/b']", "stood without a url"),
        ("[[shards]]\nname = 'a'\n[[shards]]\nname = 'a'\nurl = 'postgresql://a/b'", "named a 2 times"),
        ("[[shards]]\nname = 'a'\n[[shards]]\nname = 'b'", "left the url out more than once"),
        ("[database]\nregion = 'eu'\n[[shards]]\nname = 'a'\nregion = 'us'", "had none for the region 'eu'"),
        ("[[shards]]\nname = 'a'\nregion = 'us'", "which names no region"),
    ],
)
def test_shards_that_cannot_be_meant_are_a_mistake(text: str, why: str) -> None:
    assert why in only_mistake(text)


def test_the_addresses_of_shards_are_hidden() -> None:
    settings = parse("[[shards]]\nname = 'a'\nurl = 'postgresql://me:sesame@a/b'", {})

    assert "sesame" not in show(settings) + repr(plain(settings))


def test_plain_settings_have_only_what_json_knows() -> None:
    settings = parse("[database]\nurl = 'postgresql://a:b@c/d'\n[models.a]", {})

    document = msgspec.json.decode(msgspec.json.encode(plain(settings)))

    assert document["database"].items() >= {"url": "…", "data_dir": "", "timeout_s": 5.0}.items()
    assert document["models"]["a"]["context_buckets"][0] == 4096


def test_settings_shown_as_plain_hide_only_secrets() -> None:
    with pytest.raises(TypeError, match="no plain form"):
        plain(Settings(models={"a": object()}))  # type: ignore[dict-item]


# --- The model ---


def numbers(shape: shapes.StructType) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for field in shape.fields:
        kinds = field.type.types if isinstance(field.type, shapes.UnionType) else (field.type,)
        for kind in kinds:
            match kind:
                case shapes.IntType() | shapes.FloatType():
                    found.add((shape.cls.__name__, field.name))
                case shapes.StructType():
                    found |= numbers(kind)
                case shapes.VarTupleType(item_type=shapes.StructType() as item):
                    found |= numbers(item)
                case shapes.DictType(value_type=shapes.StructType() as item):
                    found |= numbers(item)
    return found


def test_every_number_of_the_model_has_a_range_and_every_range_a_number() -> None:
    ranged = {(group.__name__, field) for group, ranges in RANGES.items() for field in ranges}

    assert ranged == numbers(SHAPE)


def test_every_default_is_within_its_range() -> None:
    assert parse(show(Settings()), {}) == Settings()
