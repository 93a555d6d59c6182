//! The few of Kafka's requests that are made here, by its protocol guide (<https://kafka.apache.org/protocol>). No library is
//! linked for them: this command is built before everything else.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const METADATA: i16 = 3;
const CREATE_ACLS: i16 = 30;
const DELETE_ACLS: i16 = 31;

/// Kinds of resources that permissions are about (`ResourceType.java`).
pub(super) const TOPIC: u8 = 2;
pub(super) const GROUP: u8 = 3;
pub(super) const CLUSTER: u8 = 4;
pub(super) const TRANSACTIONAL_ID: u8 = 5;

/// `PatternType.java`.
const LITERAL: u8 = 3;
/// `AclOperation.java`.
const ANY_OPERATION: u8 = 2;

/// Longer than any answer that is read here.
const LONGEST: usize = 8 << 20;

/// Whether everything is allowed or denied (`AclPermissionType.java`).
#[derive(Clone, Copy)]
pub(super) enum Permission {
    Deny = 2,
    Allow = 3,
}

/// A connection without a password.
pub(super) struct Wire(TcpStream);

impl Wire {
    /// Connects; every request ends within the limit too.
    pub(super) fn connect(port: u16, limit: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self(stream))
    }

    /// How many brokers its controller knows.
    pub(super) fn registered_brokers(&mut self) -> Result<i32> {
        let mut request = Vec::new();
        request.extend(0_i32.to_be_bytes()); // no topics
        request.push(0); // do not create topics
        Answer(&self.ask(METADATA, 4, &request)?).after_throttle_time()?.int32()
    }

    /// How many brokers there are, and how many partitions have replicas that are not in sync.
    pub(super) fn cluster(&mut self) -> Result<(i32, usize)> {
        let mut request = Vec::new();
        request.extend((-1_i32).to_be_bytes()); // all topics
        request.push(0); // do not create topics
        let answer = self.ask(METADATA, 4, &request)?;
        let mut answer = Answer(&answer).after_throttle_time()?;
        let brokers = answer.int32()?;
        for _ in 0..brokers {
            answer.int32()?; // id
            answer.text()?; // host
            answer.int32()?; // port
            answer.nullable_text()?; // rack
        }
        answer.nullable_text()?; // cluster
        answer.int32()?; // controller
        let mut lagging = 0;
        for _ in 0..answer.int32()? {
            answer.int16()?; // error
            answer.text()?; // name
            answer.take(1)?; // internal
            for _ in 0..answer.int32()? {
                answer.take(2 + 4 + 4)?; // error, number, leader
                let replicas = answer.int32s()?;
                let in_sync = answer.int32s()?;
                lagging += usize::from(in_sync < replicas);
            }
        }
        Ok((brokers, lagging))
    }

    /// Lets `user` do everything with those resources from now on, or nothing. Which says less than what is there already changes
    /// nothing.
    pub(super) fn add(&mut self, user: &str, resources: &[(u8, &str)], permission: Permission) -> Result<()> {
        self.each(CREATE_ACLS, user, resources, permission)
    }

    /// Takes back what [`Wire::add`] has added. What is not there stays away.
    pub(super) fn remove(&mut self, user: &str, resources: &[(u8, &str)], permission: Permission) -> Result<()> {
        self.each(DELETE_ACLS, user, resources, permission)
    }

    /// One request for each: then the answer begins with what became of it. A binding that is made and a filter for one are the same
    /// on the line, as long as the filter leaves nothing open.
    fn each(&mut self, key: i16, user: &str, resources: &[(u8, &str)], permission: Permission) -> Result<()> {
        for (kind, name) in resources {
            let mut request = 1_i32.to_be_bytes().to_vec();
            request.push(*kind);
            put_text(&mut request, name)?;
            request.push(LITERAL);
            put_text(&mut request, user)?;
            put_text(&mut request, "*")?; // from every host
            request.extend([ANY_OPERATION, permission as u8]);
            let answer = self.ask(key, 1, &request)?;
            let mut answer = Answer(&answer).after_throttle_time()?;
            ensure!(answer.int32()? == 1, "one permission was asked for, and the answer is about others");
            let code = answer.int16()?;
            ensure!(code == 0, "Kafka answers with error {code}: {}", answer.text().unwrap_or_default());
        }
        Ok(())
    }

    /// The answer, from behind its correlation id.
    fn ask(&mut self, key: i16, version: i16, body: &[u8]) -> Result<Vec<u8>> {
        let mut request = Vec::new();
        request.extend(key.to_be_bytes());
        request.extend(version.to_be_bytes());
        request.extend(1_i32.to_be_bytes()); // correlation id
        request.extend((-1_i16).to_be_bytes()); // no client id
        request.extend(body);
        self.0.write_all(&i32::try_from(request.len())?.to_be_bytes())?;
        self.0.write_all(&request)?;
        let mut head = [0_u8; 8];
        self.0.read_exact(&mut head)?;
        let mut head = Answer(&head);
        let length = usize::try_from(head.int32()?)?;
        ensure!(head.int32()? == 1, "the answer belongs to another request: not Kafka?");
        let Some(rest @ 0..=LONGEST) = length.checked_sub(4) else { bail!("an answer of {length} bytes: not Kafka?") };
        let mut answer = vec![0; rest];
        self.0.read_exact(&mut answer)?;
        Ok(answer)
    }
}

fn put_text(request: &mut Vec<u8>, text: &str) -> Result<()> {
    request.extend(i16::try_from(text.len())?.to_be_bytes());
    request.extend(text.bytes());
    Ok(())
}

/// What is left of an answer.
struct Answer<'a>(&'a [u8]);

impl<'a> Answer<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).context("the answer ends too early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn int16(&mut self) -> Result<i16> {
        Ok(i16::from_be_bytes(self.take(2)?.try_into()?))
    }

    fn int32(&mut self) -> Result<i32> {
        Ok(i32::from_be_bytes(self.take(4)?.try_into()?))
    }

    fn text(&mut self) -> Result<String> {
        let length = usize::try_from(self.int16()?)?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    fn nullable_text(&mut self) -> Result<()> {
        let length = self.int16()?;
        self.take(usize::try_from(length).unwrap_or(0)).map(drop)
    }

    /// How many there are.
    fn int32s(&mut self) -> Result<i32> {
        let count = self.int32()?;
        self.take(usize::try_from(count)? * 4)?;
        Ok(count)
    }

    fn after_throttle_time(mut self) -> Result<Self> {
        self.int32()?;
        Ok(self)
    }
}
