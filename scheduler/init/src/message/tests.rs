//! Every message through its encoding, and what must not be accepted.

use super::*;

fn requests() -> Vec<Request> {
    let spawn = SpawnRequest {
        job: "turn-7".into(),
        argv: vec![b"sh".to_vec(), b"-c".to_vec(), vec![0xff, b'x']],
        env: vec![b"A=b".to_vec()],
        cwd: Some(b"/tmp".to_vec()),
        user: Some("1000:100".into()),
        tty: Some((80, 24)),
        stdin: true,
        timeout_ms: Some(5),
    };
    vec![
        Request::Ping,
        Request::Spawn(spawn),
        Request::Spawn(SpawnRequest {
            job: "x".into(),
            ..SpawnRequest::default()
        }),
        Request::Attach {
            job: "a".into(),
            stdout_from: 1,
            stderr_from: u64::MAX,
        },
        Request::Stdin {
            offset: 9,
            data: vec![1, 2, 3],
        },
        Request::StdinClose,
        Request::Resize { cols: 1, rows: 2 },
        Request::Signal {
            job: "a".into(),
            signal: 15,
            scope: SignalScope::Session,
        },
        Request::List,
        Request::Forget { job: "a".into() },
    ]
}

fn events() -> Vec<Event> {
    vec![
        Event::Pong {
            version: "1".into(),
        },
        Event::Started {
            pid: 3,
            new: true,
            stdin_received: 4,
        },
        Event::Stdout {
            offset: 0,
            data: vec![0; 100],
        },
        Event::Stderr {
            offset: 5,
            data: vec![],
        },
        Event::Lost {
            stderr: true,
            from: 1,
            to: 2,
        },
        Event::Exited {
            status: ExitStatus::Signal(9),
            timed_out: true,
            stdout_len: 1,
            stderr_len: 2,
        },
        Event::Jobs(vec![JobInfo {
            job: "j".into(),
            pid: 1,
            tty: true,
            status: Some(ExitStatus::Code(-1)),
        }]),
        Event::Done,
        Event::Error {
            kind: ErrorKind::TooMany,
            text: "no".into(),
        },
    ]
}

#[test]
fn messages_survive_the_wire_and_every_truncation_is_refused() {
    for r in requests() {
        let bytes = r.encode();
        assert_eq!(Request::decode(&bytes).as_ref(), Ok(&r));
        for n in 0..bytes.len() {
            assert!(Request::decode(&bytes[..n]).is_err(), "{r:?} cut at {n}");
        }
    }
    for e in events() {
        let bytes = e.encode();
        assert_eq!(Event::decode(&bytes).as_ref(), Ok(&e));
        for n in 0..bytes.len() {
            assert!(Event::decode(&bytes[..n]).is_err(), "{e:?} cut at {n}");
        }
    }
}

#[test]
fn hostile_counts_and_names_are_refused() {
    let mut bytes = vec![1, 1, 0, 0, 0, b'j'];
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(Request::decode(&bytes), Err(DecodeError::TooLong));
    let mut bytes = vec![1, 1, 0, 0, 0, b'j'];
    bytes.extend_from_slice(&1000u32.to_le_bytes());
    assert_eq!(Request::decode(&bytes), Err(DecodeError::Short));
    assert_eq!(
        Request::decode(&Request::Forget { job: "a b".into() }.encode()),
        Err(DecodeError::BadText)
    );
    assert_eq!(
        Request::decode(
            &Request::Forget {
                job: "x".repeat(129)
            }
            .encode()
        ),
        Err(DecodeError::TooLong)
    );
    let mut trailing = Request::Ping.encode();
    trailing.push(0);
    assert_eq!(Request::decode(&trailing), Err(DecodeError::Trailing));
}

#[test]
fn long_error_texts_are_cut_between_characters() {
    let text = "é".repeat(MAX_TEXT);
    let sent = Event::Error {
        kind: ErrorKind::Invalid,
        text,
    }
    .encode();
    let Ok(Event::Error { text, .. }) = Event::decode(&sent) else {
        panic!("an error event")
    };
    assert_eq!(text.len(), MAX_TEXT);
}
