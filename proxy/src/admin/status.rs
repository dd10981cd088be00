//! What a refusal is over HTTP: its status, its body in OpenAI's form, and when to come again.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use p2p_sync_proto::{Code, Problem};
use serde_json::json;

/// Before who was turned away by something that passes comes again.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// A budget's.
const DAY_SECONDS: u64 = 86_400;

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    problem: Problem,
    /// Which member of the request is meant.
    param: Option<&'static str>,
    retry_after: Option<Duration>,
}

impl Refusal {
    /// Of a member of the request.
    pub(super) fn of(param: &'static str, problem: Problem) -> Self {
        Self {
            param: Some(param),
            ..problem.into()
        }
    }

    /// Of the member that a table names for its code, where it does.
    pub(super) fn among(problem: Problem, params: &[(Code, &'static str)]) -> Self {
        let found = params.iter().find(|(code, _)| *code == problem.code);
        Self {
            param: found.map(|(_, param)| *param),
            ..problem.into()
        }
    }

    /// Until so long has passed.
    pub(super) fn for_now(problem: Problem, retry_after: Duration) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..problem.into()
        }
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        let retry_after = match problem.code {
            Code::BudgetSpent => Some(until_tomorrow()),
            code if code.is_retryable() && code != Code::Internal => Some(RETRY_AFTER),
            _ => None,
        };
        Self {
            problem,
            param: None,
            retry_after,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = status(self.problem.code);
        let error = json!({
            "message": self.problem.sentence,
            "type": kind(self.problem.code, status),
            "param": self.param,
            "code": self.problem.code.label(),
        });
        let mut response = answer(status, json!({ "error": error }).to_string());
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // OpenAI's clients ask again after any 429 and 5xx unless they are told not to.
        if matches!(self.problem.code, Code::BudgetSpent | Code::Unsupported) {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        response
    }
}

/// JSON with a status.
pub(super) fn answer(status: StatusCode, json: String) -> Response {
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

/// The one place that says which status a code has.
pub(super) fn status(code: Code) -> StatusCode {
    match code {
        Code::None => StatusCode::OK,
        Code::BadToken => StatusCode::UNAUTHORIZED,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::TooLarge | Code::TextTooLong => StatusCode::PAYLOAD_TOO_LARGE,
        Code::TextRefused => StatusCode::UNPROCESSABLE_ENTITY,
        Code::Conflict => StatusCode::CONFLICT,
        Code::RateLimited | Code::BudgetSpent => StatusCode::TOO_MANY_REQUESTS,
        Code::TooSlow => StatusCode::REQUEST_TIMEOUT,
        Code::Unsupported => StatusCode::NOT_IMPLEMENTED,
        // By what its hundred is of: the hub's settings, what was sent, who sent it, what passes.
        code => match code as i32 {
            200..300 => StatusCode::BAD_REQUEST,
            300..400 => StatusCode::FORBIDDEN,
            400..500 => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        },
    }
}

/// As OpenAI sorts errors, which its clients look at.
fn kind(code: Code, status: StatusCode) -> &'static str {
    match (code, status) {
        // Who knows it does not ask again.
        (Code::BudgetSpent, _) => "insufficient_quota",
        (_, StatusCode::UNAUTHORIZED) => "authentication_error",
        (_, StatusCode::FORBIDDEN) => "permission_error",
        (_, StatusCode::TOO_MANY_REQUESTS) => "rate_limit_error",
        (_, status) if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    }
}

fn until_tomorrow() -> Duration {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::from_secs(DAY_SECONDS - since_1970.as_secs() % DAY_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_the_status_that_a_client_of_http_expects() {
        for (code, expected) in [
            (Code::InvalidJson, 400),
            (Code::BadRequest, 400),
            (Code::EmptyText, 400),
            (Code::WrongDimensions, 400),
            (Code::NotFinite, 400),
            (Code::BadMap, 400),
            (Code::BadToken, 401),
            (Code::NotAllowed, 403),
            (Code::NotFound, 404),
            (Code::TooSlow, 408),
            (Code::TextTooLong, 413),
            (Code::TooLarge, 413),
            (Code::TextRefused, 422),
            (Code::BudgetSpent, 429),
            (Code::RateLimited, 429),
            (Code::Internal, 500),
            (Code::BadEmbeddingProvider, 500),
            (Code::Unsupported, 501),
            (Code::EmbeddingsUnavailable, 503),
            (Code::HubUnavailable, 503),
        ] {
            assert_eq!(status(code).as_u16(), expected, "{code}");
        }
    }

    #[test]
    fn who_may_come_again_is_told_when_and_who_need_not_is_told_so() {
        let of = |code| {
            let response = Refusal::from(Problem::new(code, "x")).into_response();
            let header = |name: &str| {
                response
                    .headers()
                    .get(name)
                    .and_then(|value| value.to_str().ok())
                    .map(str::to_owned)
            };
            (header("retry-after"), header("x-should-retry"))
        };
        assert_eq!(of(Code::HubUnavailable), (Some("5".to_owned()), None));
        assert_eq!(of(Code::EmptyText), (None, None));
        let (after, again) = of(Code::BudgetSpent);
        let seconds: u64 = after.and_then(|text| text.parse().ok()).expect("until tomorrow");
        assert!((1..=DAY_SECONDS).contains(&seconds), "{seconds}");
        assert_eq!(again.as_deref(), Some("false"));
    }
}
