//! What SQS and SNS answer over HTTP.

use anybroker_conformance::{HttpAnswer, HttpService};

use crate::access::Access;
use crate::sqs::endpoint;

/// SQS, and SNS at the same address.
pub(crate) struct Service;

impl Service {
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        match endpoint(access) {
            Some(url) if url.starts_with("http://") => Ok(Self),
            Some(_) => Err("connections to it are encrypted, so that no proxy can answer in its place".into()),
            None => Err("the client finds the address by itself, so that no proxy can answer in its place".into()),
        }
    }
}

impl HttpService for Service {
    /// "The request was denied due to request throttling", with status 400
    /// (<https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessageBatch.html>), in the protocol
    /// `awsJson1_0` (<https://smithy.io/2.0/aws/protocols/aws-json-1_0-protocol.html>). SNS is asked by forms, and answers in XML
    /// (`awsQuery`; <https://docs.aws.amazon.com/sns/latest/api/CommonErrors.html>).
    fn throttled(&self, content_type: &str) -> HttpAnswer {
        let (form, body) = match content_type.starts_with("application/x-www-form-urlencoded") {
            true => (
                "text/xml",
                "<ErrorResponse xmlns=\"http://sns.amazonaws.com/doc/2010-03-31/\"><Error><Type>Sender</Type><Code>Throttled\
                 </Code><Message>Rate exceeded</Message></Error><RequestId>r</RequestId></ErrorResponse>",
            ),
            false => (
                "application/x-amz-json-1.0",
                r#"{"__type":"com.amazonaws.sqs#RequestThrottled","message":"Rate exceeded"}"#,
            ),
        };
        HttpAnswer { status: 400, headers: vec![("Content-Type".into(), form.into())], body: body.into() }
    }
}
