"""Errors: every code of librdkafka has a class, and each class is what its builtin means too."""

import inspect
import pickle
from typing import Any

import pytest

from keven_core._native.library import error_descriptions
from keven_core.kafka import errors
from keven_core.kafka.errors import (
    CommitError,
    DeadLetterError,
    Delivery,
    DeliveryError,
    KafkaError,
    KevenError,
    RecordError,
    RedriveError,
    UsageError,
    kafka_error,
    refused_credentials,
)

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
]
DESCRIPTIONS = error_descriptions()

BUILTINS = {
    "ConfigurationError": ValueError,
    "RegistrationError": TypeError,
    "LaunchError": RuntimeError,
    "ClosedError": RuntimeError,
    "ForkedProcessError": RuntimeError,
    "QueueFullError": TimeoutError,
    "MessageTooLargeError": ValueError,
    "UndecodableError": ValueError,
    "KafkaTimeoutError": TimeoutError,
    "BrokerUnavailableError": ConnectionError,
    "AuthenticationError": PermissionError,
    "AuthorizationError": PermissionError,
    "UnknownTopicError": LookupError,
    "OffsetOutOfRangeError": LookupError,
}


def test_everything_public_is_listed_in_order() -> None:
    assert errors.__all__ == sorted(errors.__all__)
    functions = {name for name, value in vars(errors).items() if inspect.isfunction(value) and name[0] != "_"}
    assert set(errors.__all__) == {cls.__name__ for cls in CLASSES} | functions | {"Delivery"}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_is_ours_documented_and_of_one_family(cls: type[KevenError]) -> None:
    assert issubclass(cls, KevenError)
    assert cls.__doc__
    bases = (UsageError, RecordError, errors.DrainError, KafkaError, errors.InternalError)
    families = [family for family in bases if issubclass(cls, family)]
    assert len(families) == (0 if cls is KevenError else 1)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_classes_that_mean_what_a_builtin_means_derive_from_it(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_TRANSPORT", "BrokerUnavailableError"),
        ("_RESOLVE", "BrokerUnavailableError"),
        ("_ALL_BROKERS_DOWN", "BrokerUnavailableError"),
        ("_TIMED_OUT", "KafkaTimeoutError"),
        ("_MSG_TIMED_OUT", "KafkaTimeoutError"),
        ("REQUEST_TIMED_OUT", "KafkaTimeoutError"),
        ("_AUTHENTICATION", "AuthenticationError"),
        ("SASL_AUTHENTICATION_FAILED", "AuthenticationError"),
        ("TOPIC_AUTHORIZATION_FAILED", "AuthorizationError"),
        ("GROUP_AUTHORIZATION_FAILED", "AuthorizationError"),
        ("UNKNOWN_TOPIC_OR_PART", "UnknownTopicError"),
        ("_UNKNOWN_PARTITION", "UnknownTopicError"),
        ("_AUTO_OFFSET_RESET", "OffsetOutOfRangeError"),
        ("OFFSET_OUT_OF_RANGE", "OffsetOutOfRangeError"),
        ("_FATAL", "KafkaError"),
        ("NEW_IN_SOME_FUTURE_VERSION", "KafkaError"),
    ],
)
def test_names_of_librdkafka_choose_the_class(name: str, expected: str) -> None:
    error = kafka_error(-42, name, "text", fatal=True)
    assert type(error).__name__ == expected
    assert (error.code, error.name, error.fatal, str(error)) == (-42, name, True, "text")


def test_every_name_in_the_table_is_one_that_librdkafka_has() -> None:
    known = {name for _, name, _ in DESCRIPTIONS}
    assert set(errors._CLASS_OF_NAME) <= known


def test_librdkafka_names_its_errors() -> None:
    by_code = {code: name for code, name, _ in DESCRIPTIONS}
    assert by_code[-195] == "_TRANSPORT"
    assert by_code[3] == "UNKNOWN_TOPIC_OR_PART"
    assert len(by_code) > 150
    assert all(isinstance(text, str) for _, _, text in DESCRIPTIONS)


@pytest.mark.parametrize(
    ("name", "text", "refused"),
    [
        ("_AUTHENTICATION", "SASL authentication failed", True),
        ("SASL_AUTHENTICATION_FAILED", "no", True),
        ("_SSL", "broker certificate could not be verified", True),
        ("_SSL", "connection lost during the handshake", False),
        ("_TRANSPORT", "certificate of incorporation", False),
    ],
)
def test_refused_credentials(name: str, text: str, refused: bool) -> None:
    error = kafka_error(-1, name, text)
    found = refused_credentials(error)
    if refused:
        assert isinstance(found, errors.AuthenticationError)
        assert (str(found), found.code, found.name) == (text, -1, name)
    else:
        assert found is None


@pytest.mark.parametrize(
    "error",
    [
        kafka_error(3, "UNKNOWN_TOPIC_OR_PART", "no such topic", fatal=True),
        CommitError("not confirmed", [("t", 0, 5)], code=-185, name="_TIMED_OUT"),
        DeliveryError("not delivered", [("t", "reason")], 7, code=10, name="X"),
        DeadLetterError("not copied", [("t", "reason")], 1),
        RedriveError("not copied", [(0, 5)], failures=[("t", "reason")], failed_count=1),
        errors.ConfigurationError("wrong"),
        errors.WorkerDiedError(3, "it was killed by SIGKILL"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error: Any) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_commit_error_names_its_offsets() -> None:
    assert CommitError("text").offsets == []
    error = CommitError("text", [("t", 0, 5)], code=-185, name="_TIMED_OUT")
    assert (error.offsets, error.code, error.name) == ([("t", 0, 5)], -185, "_TIMED_OUT")
    assert isinstance(error, KafkaError)


def test_delivery_error_counts() -> None:
    assert (DeliveryError("text").failures, DeliveryError("text").failed_count) == ([], 0)
    failed = Delivery("t", b"value", None, KafkaError("r"), "not delivered", [], 0)
    error = DeadLetterError("text", [failed], 3)
    assert (error.failures, error.failed_count) == ([failed], 3)
    assert isinstance(error, DeliveryError)


def test_plain_kafka_error_has_defaults() -> None:
    error = KafkaError("text")
    assert (error.code, error.name, error.fatal) == (0, "", False)
