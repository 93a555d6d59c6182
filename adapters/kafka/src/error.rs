//! What librdkafka's codes mean in the terms of the contract.

use anybroker_core::{Effect, Error, ErrorKind};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

/// A failure of a verb other than publish.
pub(crate) fn failed(operation: &'static str, error: &KafkaError) -> Error {
    let code = error.rdkafka_error_code().filter(|_| !matches!(error, KafkaError::ClientConfig(..)));
    let kind = match (code, error) {
        (Some(code), _) => kind(code),
        // A value that does not fit, or a certificate or key that cannot be read.
        (None, KafkaError::ClientConfig(..) | KafkaError::ClientCreation(_)) => ErrorKind::ConfigInvalid,
        (None, _) => ErrorKind::Unexpected,
    };
    Error::new(kind, operation, error.to_string())
}

/// What became of a message that librdkafka took and then gave up on.
pub(crate) fn unpublished(error: &KafkaError) -> Error {
    let Some(code) = error.rdkafka_error_code() else { return failed("publish", error) };
    let (kind, effect) = match code {
        // The message timed out in the queue or in flight: it may be stored (librdkafka #2163, #2188).
        Code::MessageTimedOut => (ErrorKind::Timeout, Effect::Unknown),
        // Also of the queue: an earlier attempt may have been stored.
        Code::PurgeQueue | Code::PurgeInflight | Code::Fatal => (ErrorKind::Unavailable, Effect::Unknown),
        Code::QueueFull => (ErrorKind::RateLimited, Effect::NotDone),
        Code::NotEnoughReplicas => (ErrorKind::Unavailable, Effect::NotDone),
        // Another record of its batch was refused; by itself it may be taken.
        Code::InvalidDifferentRecord => (ErrorKind::Unavailable, Effect::NotDone),
        code => match kind(code) {
            kind @ (ErrorKind::TooLarge
            | ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::InvalidMessage
            | ErrorKind::Unauthenticated) => (kind, Effect::NotDone),
            kind => (kind, Effect::Unknown),
        },
    };
    Error::new(kind, "publish", error.to_string()).with_effect(effect)
}

/// What librdkafka tells of a connection that was not let in. It goes on trying; the reason is all there is to know why
/// nothing works. Its texts name hosts and certificates, and no secrets.
pub(crate) fn refused(code: Code, reason: &str) -> Option<Error> {
    let kind = match code {
        Code::Authentication | Code::SaslAuthenticationFailed | Code::UnsupportedSASLMechanism => {
            ErrorKind::Unauthenticated
        }
        // The server's certificate is not trusted or names another host, or the server wants one of ours.
        Code::SSL => ErrorKind::Unauthenticated,
        _ => return None,
    };
    Some(Error::new(kind, "connect", reason.to_owned()))
}

pub(crate) fn kind(code: Code) -> ErrorKind {
    match code {
        Code::MessageSizeTooLarge | Code::InvalidMessageSize | Code::MessageBatchTooLarge => ErrorKind::TooLarge,
        Code::UnknownTopicOrPartition
        | Code::UnknownTopic
        | Code::UnknownPartition
        | Code::UnknownTopicId
        | Code::GroupIdNotFound => ErrorKind::NotFound,
        Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed
        | Code::PolicyViolation => ErrorKind::PermissionDenied,
        Code::SaslAuthenticationFailed
        | Code::Authentication
        | Code::SSL
        | Code::UnsupportedSASLMechanism
        | Code::IllegalSASLState => ErrorKind::Unauthenticated,
        Code::InvalidTimestamp | Code::InvalidRecord | Code::InvalidMessage => ErrorKind::InvalidMessage,
        // Another process has taken the transactional id of this one.
        Code::TopicAlreadyExists | Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch => {
            ErrorKind::AlreadyExists
        }
        Code::InvalidTopic | Code::InvalidGroupId | Code::InvalidConfig | Code::InvalidReplicationFactor => {
            ErrorKind::ConfigInvalid
        }
        Code::QueueFull | Code::ThrottlingQuotaExceeded => ErrorKind::RateLimited,
        Code::OperationTimedOut | Code::RequestTimedOut | Code::MessageTimedOut | Code::TimedOutQueue => {
            ErrorKind::Timeout
        }
        Code::BrokerTransportFailure
        | Code::AllBrokersDown
        | Code::Resolve
        | Code::WaitingForCoordinator
        | Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::BrokerNotAvailable
        | Code::ReplicaNotAvailable
        | Code::NetworkException
        | Code::CoordinatorLoadInProgress
        | Code::CoordinatorNotAvailable
        | Code::ConcurrentTransactions
        | Code::TransactionCoordinatorFenced
        | Code::NotCoordinator
        | Code::NotController
        | Code::NotEnoughReplicas
        | Code::NotEnoughReplicasAfterAppend
        | Code::KafkaStorageError
        | Code::UnstableOffsetCommit => ErrorKind::Unavailable,
        Code::IllegalGeneration
        | Code::RebalanceInProgress
        | Code::UnknownMemberId
        | Code::AssignmentLost
        | Code::FencedInstanceId => ErrorKind::StaleDelivery,
        _ => ErrorKind::Unexpected,
    }
}
