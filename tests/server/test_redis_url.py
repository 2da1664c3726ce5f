"""What --redis_url may say, and what is refused in a sentence that repeats no secret."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_server.redis_url import FORMS, Login, RedisUrl, RedisUrlError, TlsFiles, parse_redis_url

THREE = (("h1", 26379), ("h2", 5), ("h3", 26379))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("unix:///run/r.sock", RedisUrl("socket", "unix", path="/run/r.sock")),
        ("unix://u:p@/run/a%20b.sock?db=3", RedisUrl("socket", "unix", path="/run/a b.sock", database=3, login=Login("u", "p"))),
        ("redis://h", RedisUrl("one", "redis", (("h", 6379),))),
        ("redis://:p%40%2F@[::1]:7/2", RedisUrl("one", "redis", (("::1", 7),), database=2, login=Login("", "p@/"))),
        ("redis://u:a@b@h", RedisUrl("one", "redis", (("h", 6379),), login=Login("u", "a@b"))),
        ("rediss://h", RedisUrl("one", "rediss", (("h", 6379),), tls=TlsFiles())),
        (
            "rediss://h?ssl_ca_certs=/a&ssl_certfile=/b&ssl_keyfile=/c&ssl_check_hostname=false",
            RedisUrl("one", "rediss", (("h", 6379),), tls=TlsFiles("/a", "/b", "/c", True, False)),
        ),
        ("rediss://h?ssl_cert_reqs=none", RedisUrl("one", "rediss", (("h", 6379),), tls=TlsFiles(verify=False, check_hostname=False))),
        (
            "redis+sentinel://u:p@h1,h2:5,h3/mymaster/4?sentinel_username=s&sentinel_password=t",
            RedisUrl("sentinel", "redis+sentinel", THREE, "", "mymaster", 4, Login("u", "p"), Login("s", "t")),
        ),
        ("rediss+sentinel://h1/m", RedisUrl("sentinel", "rediss+sentinel", THREE[:1], master="m", tls=TlsFiles())),
        ("redis+cluster://h1:1,h2:2", RedisUrl("cluster", "redis+cluster", (("h1", 1), ("h2", 2)))),
        ("rediss+cluster://h1:1/0", RedisUrl("cluster", "rediss+cluster", (("h1", 1),), tls=TlsFiles())),
    ],
)
def test_right_form_is_taken_apart(text: str, url: RedisUrl) -> None:
    assert parse_redis_url(text) == url


@pytest.mark.parametrize("form", FORMS.values())
def test_every_form_that_is_shown_is_one_that_is_taken(form: str) -> None:
    assert parse_redis_url(form).scheme == form.partition(":")[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must begin with unix://"),
        ("h:6379", "must begin with unix://"),
        ("http://h", "must begin with .* or rediss\\+cluster://; got http://"),
        ("redis+sentinels://h", "must begin with"),
        ("redis://", "has an empty host; the right form is redis://user:password@host:6379/0"),
        ("redis://h:0", "has port 0: 1 to 65,535"),
        ("redis://h:70000", "has a port that is none: 1 to 65,535"),
        ("redis://h:x", "has a port that is none"),
        ("redis://[::1", "cannot be read: a \\[ without its \\]"),
        ("redis://h1,h2", "names 2 hosts; several go with redis\\+sentinel:// or redis\\+cluster://"),
        ("redis://h/one", "has something other than the number of a database at its end"),
        ("redis://h/1/2", "has more than the number of a database after its host"),
        ("redis://h/99999999999", "has something other than the number of a database"),
        ("redis://h?ssl_ca_certs=/a", "has an option that redis:// does not take, known are db"),
        ("redis://h?timeout=3", "has an option that redis:// does not take"),
        ("rediss://h?ssl_certfile=/a", "has one of ssl_certfile and ssl_keyfile; a client's certificate needs both"),
        ("rediss://h?ssl_cert_reqs=optional", "has another ssl_cert_reqs than required or none"),
        ("rediss://h?ssl_check_hostname=1", "has another ssl_check_hostname than true or false"),
        ("redis+sentinel://h1,h2", "must name the master after the hosts; the right form is redis\\+sentinel://.*/mymaster/0"),
        ("redis+sentinel://h1,,h2/m", "has an empty host"),
        ("redis+sentinel://h1/m/x", "has something other than the number"),
        ("redis+cluster://h1/1", "names a database, and a Cluster has none but 0"),
        ("redis+cluster://h1?db=1", "has an option that redis\\+cluster:// does not take, known are none"),
        ("unix://run/redis.sock", "needs the whole path of a socket after its three slashes"),
        ("unix://", "needs the whole path of a socket"),
        ("redis://u:p#w@h", "has a # in it; write it as %23"),
    ],
)
def test_wrong_form_is_refused_with_the_right_one(text: str, sentence: str) -> None:
    with pytest.raises(RedisUrlError, match=f"^--redis_url {sentence}"):
        parse_redis_url(text)


SECRET = "hunter2"


@pytest.mark.parametrize("scheme", FORMS)
@given(wrong=st.sampled_from("?#/@:&=,[]% "), right=st.sampled_from(["", "h", "h:1/m", "h/m/0?db=x", "h?ssl_cert_reqs=no"]))
def test_no_refusal_and_no_address_for_people_repeats_a_password(scheme: str, wrong: str, right: str) -> None:
    """Also not one whose marks were not written as %xx, which puts a part of it where another part of the URL is looked for."""
    for text in (f"{scheme}://user:{wrong}{SECRET}{wrong}{SECRET}@{right}", f"{scheme}://{right}?sentinel_password={SECRET}"):
        try:
            url = parse_redis_url(text)
            said = repr(url) + url.shown
        except RedisUrlError as error:
            said = str(error)
        assert SECRET not in said
