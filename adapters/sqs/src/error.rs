//! What SQS's answers mean in the terms of the contract.

use std::error::Error as StdError;

use anybroker_core::{Effect, Error, ErrorKind};
use aws_sdk_sns::types::BatchResultErrorEntry as TopicErrorEntry;
use aws_sdk_sqs::config::http::HttpResponse;
use aws_sdk_sqs::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::types::BatchResultErrorEntry;

/// The error of a request. The effect is *unknown* unless the request certainly did nothing.
pub(crate) fn failed<E>(operation: &'static str, error: &SdkError<E, HttpResponse>) -> Error
where
    E: StdError + ProvideErrorMetadata + Send + Sync + 'static,
{
    let (kind, effect) = match error {
        SdkError::ConstructionFailure(_) => (ErrorKind::ConfigInvalid, Effect::NotDone),
        SdkError::TimeoutError(_) => (ErrorKind::Timeout, Effect::Unknown),
        SdkError::DispatchFailure(failure) => {
            if let Some(error) = of_provider(error) {
                (error.kind(), error.effect())
            } else if is_refused(failure.as_connector_error().map(|error| error as _)) {
                (ErrorKind::Unavailable, Effect::NotDone)
            } else if failure.is_other() && is_missing_credentials(error) {
                (ErrorKind::Unauthenticated, Effect::NotDone)
            } else {
                (ErrorKind::Unavailable, Effect::Unknown)
            }
        }
        SdkError::ServiceError(service) => {
            let kind = match kind(service.err().code().unwrap_or_default()) {
                // What stands between has answered, such as a load balancer, or SQS in words that are not known here.
                ErrorKind::Unexpected if service.raw().status().is_server_error() => ErrorKind::Unavailable,
                kind => kind,
            };
            let is_certain = !matches!(kind, ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::Unexpected);
            (kind, if is_certain { Effect::NotDone } else { Effect::Unknown })
        }
        _ => (ErrorKind::Unavailable, Effect::Unknown),
    };
    let text = match error {
        SdkError::ServiceError(service) => {
            let (code, message) = (service.err().code().unwrap_or("no code"), service.err().message());
            format!("{code}: {}", message.unwrap_or("no message"))
        }
        _ => DisplayErrorContext(error).to_string(),
    };
    Error::new(kind, operation, text).with_effect(effect)
}

/// One entry of a batch that was refused while the request as a whole was answered with success.
pub(crate) fn failed_entry(operation: &'static str, entry: &BatchResultErrorEntry) -> Error {
    refused(operation, entry.code(), entry.sender_fault(), entry.message())
}

/// The same of SNS.
pub(crate) fn failed_topic_entry(operation: &'static str, entry: &TopicErrorEntry) -> Error {
    refused(operation, entry.code(), entry.sender_fault(), entry.message())
}

fn refused(operation: &'static str, code: &str, is_senders: bool, message: Option<&str>) -> Error {
    let kind = match kind(code) {
        ErrorKind::Unexpected if is_senders => ErrorKind::InvalidMessage,
        ErrorKind::Unexpected => ErrorKind::Unavailable,
        kind => kind,
    };
    let text = format!("{code}: {}", message.unwrap_or("no message"));
    // An error inside of SQS tells as little of an entry as it tells of a request.
    let effect = if kind == ErrorKind::Unavailable { Effect::Unknown } else { Effect::NotDone };
    Error::new(kind, operation, text).with_effect(effect)
}

/// An entry that the answer does not mention.
pub(crate) fn unmentioned(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unexpected, operation, "the answer says nothing of this entry")
}

/// The codes that say who asks is not known, or not any more.
pub(crate) const UNAUTHENTICATED: &[&str] = &[
    "InvalidClientTokenId",
    "InvalidAccessKeyId",
    "AuthFailure",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
    "MissingAuthenticationToken",
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidSecurity",
];

fn kind(code: &str) -> ErrorKind {
    let code = code.rsplit(['.', '#']).next().unwrap_or(code);
    match code {
        "NonExistentQueue" | "QueueDoesNotExist" | "NotFound" | "NotFoundException" => ErrorKind::NotFound,
        "QueueNameExists" => ErrorKind::AlreadyExists,
        "AccessDenied"
        | "AccessDeniedException"
        | "AuthorizationError"
        | "AuthorizationErrorException"
        | "KmsAccessDenied"
        | "KMSAccessDenied"
        | "KMSAccessDeniedException"
        | "OptInRequired" => ErrorKind::PermissionDenied,
        code if UNAUTHENTICATED.contains(&code) => ErrorKind::Unauthenticated,
        "ReceiptHandleIsInvalid" | "MessageNotInflight" => ErrorKind::StaleDelivery,
        "BatchRequestTooLong" | "MessageTooLong" => ErrorKind::TooLarge,
        "InvalidMessageContents" | "InvalidAttributeValue" => ErrorKind::InvalidMessage,
        "RequestThrottled"
        | "Throttled"
        | "ThrottledException"
        | "Throttling"
        | "ThrottlingException"
        | "OverLimit"
        | "TooManyRequestsException" => ErrorKind::RateLimited,
        "QueueDeletedRecently" | "ServiceUnavailable" | "InternalError" | "InternalFailure" | "InternalServerError" => {
            ErrorKind::Unavailable
        }
        _ => ErrorKind::Unexpected,
    }
}

/// Whether nobody listened: then nothing was sent.
fn is_refused(error: Option<&(dyn StdError + 'static)>) -> bool {
    std::iter::successors(error, |error| StdError::source(*error)).any(|error| {
        error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    })
}

/// Why there are no credentials to ask with.
fn of_provider<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Error> {
    std::iter::successors(Some(error), |error| StdError::source(*error)).find_map(|error| error.downcast_ref())
}

fn is_missing_credentials<E: StdError + 'static, R: std::fmt::Debug + 'static>(error: &SdkError<E, R>) -> bool {
    DisplayErrorContext(error).to_string().contains("credentials")
}
